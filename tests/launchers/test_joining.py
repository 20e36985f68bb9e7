"""Joining a server with --secure: where the token goes, and where it never is."""

import os
import pty
import select
import signal
import termios
import time

import pytest

from tests.launchers.conftest import ARGUMENTS, KEYS, Device, assert_refused

TOKEN = "join1_" + "Ab3_-" * 14
KEY_FILE = "-----BEGIN PRIVATE KEY-----\nMIGH\n-----END PRIVATE KEY-----\n"
SCRIPTS = {"run_pi.sh": "flower-embedded:cpu", "run_jetson.sh": "flower-embedded:gpu"}


def joining_input(device: Device) -> str:
    """What the container that joins got by its standard input."""
    return (device.state / "joining-input").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("form", ["--join={}", "--join {}"])
def test_token_goes_to_a_container_of_its_own_by_standard_input(device, script, form):
    flags = form.format(TOKEN).split()
    run = device.run(script, "--cid=0", *flags, "--server_address=10.0.0.1:80", "--model", "Net",
                     board="jetson-r36.4")  # fmt: skip
    assert run.code == 0
    assert run.err == ""
    assert joining_input(device) == f"{TOKEN}\n"
    arguments = ["--cid=0", "--server_address=10.0.0.1:80", "--model", "Net"]
    options = run.command[3 : run.command.index("--rm")]
    without_data = options[: options.index("type=volume,source=flower-data,target=/data") - 1]
    assert run.joining == [
        "run", "--name", "flower-join-0", *without_data, "--restart", "no", "--rm", "--interactive",
        SCRIPTS[script], *arguments, "--join=-", "--join_only",
    ]  # fmt: skip
    assert KEYS[1] in without_data
    assert run.command[-5:] == [SCRIPTS[script], *arguments]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("arguments", [[f"--join={TOKEN}"], ["--join", TOKEN], ["--join=-"]])
def test_token_is_in_no_output_no_trace_no_argument_and_no_environment(device, script, arguments):
    for path in (device.tree / "run_pi.sh", device.tree / "run_jetson.sh"):
        path.write_text(path.read_text().replace("set -euo", "set -xeuo"))
    for board in ("jetson-r36.4", "jetson-r35.4"):  # with the latter run_jetson.sh hands over
        run = device.run(script, *ARGUMENTS, *arguments, board=board, text=f"{TOKEN}\n")
        assert run.code == 0
        assert "+ host=192.168.1.10" in run.err  # it was traced
        assert "+ exec docker run" in run.err
        assert joining_input(device) == f"{TOKEN}\n"
        assert TOKEN not in run.err
        assert TOKEN not in run.out
        assert not any(TOKEN in word for call in run.calls for word in call)
        assert TOKEN not in (device.state / "joining-environment").read_text()


@pytest.mark.parametrize("text", [TOKEN, f"{TOKEN}\r\n", KEY_FILE])
@pytest.mark.parametrize("name", ["-", "my file", "~/my file"])
def test_token_or_key_file_is_read_from_standard_input_or_a_file(device, name, text):
    (device.home / "my file").write_text(text, newline="")
    device.pi(*ARGUMENTS, f"--join={name}", text=text)
    assert joining_input(device).strip() == text.strip()


@pytest.fixture
def asked(device):
    """run_pi.sh that has asked a terminal for the token, and both ends of the terminal."""
    outer, inner = pty.openpty()
    process = device.popen("run_pi.sh", *ARGUMENTS, "--join=-", board="pi4", stdin=inner)
    assert process.stderr
    assert process.stderr.readline(18) == "token (not shown):"
    wait_for_echo(inner, False)
    yield process, outer, inner
    process.kill()
    process.communicate()
    os.close(outer)
    os.close(inner)


def wait_for_echo(terminal: int, on: bool) -> None:
    deadline = time.monotonic() + 10
    while bool(termios.tcgetattr(terminal)[3] & termios.ECHO) is not on:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_token_is_asked_for_on_a_terminal_without_echo(device, asked):
    process, outer, inner = asked
    os.write(outer, f"{TOKEN}\n".encode())
    assert process.wait(30) == 0
    assert joining_input(device) == f"{TOKEN}\n"
    assert select.select([outer], [], [], 0)[0] == []
    wait_for_echo(inner, True)


def test_ctrl_c_at_the_question_leaves_the_terminal_as_it_was(asked):
    process, _, inner = asked
    process.send_signal(signal.SIGINT)
    assert process.wait(10) != 0
    wait_for_echo(inner, True)


def test_running_client_stays_until_the_joining_has_succeeded(device):
    run = device.pi(*ARGUMENTS, f"--join={TOKEN}", OLD_CONTAINER="running", JOIN_CODE="1")
    assert run.code == 1
    assert run.calls[-1] == run.joining
    run = device.pi(*ARGUMENTS, f"--join={TOKEN}", OLD_CONTAINER="running")
    order = [run.calls.index(call) for call in (run.joining, run.of("rm")[0], run.command)]
    assert order == sorted(order)


@pytest.mark.parametrize("detach", [False, True])
def test_failed_joining_is_seen_and_no_client_starts(device, detach):
    run = device.pi(*ARGUMENTS, f"--join={TOKEN}", *["--detach"] * detach, JOIN_CODE="7")
    assert run.code == 7
    assert run.of("run") == [run.joining]
    assert "--detach" not in run.joining
    assert "in the background" not in run.out


def test_ctrl_c_while_joining_ends_all(device):
    process = device.popen(
        "run_pi.sh", *ARGUMENTS, f"--join={TOKEN}", board="pi4", JOIN_SLEEPS="1", group=True
    )
    assert process.stdout
    for line in process.stdout:
        if line == "joining\n":
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(10) in (-signal.SIGINT, 128 + signal.SIGINT)
    process.communicate()
    assert [call for call in device.calls()[0] if call[0] == "run"][1:] == []


def test_join_only_starts_no_client(device):
    run = device.pi(*ARGUMENTS, f"--join={TOKEN}", "--join-only", OLD_CONTAINER="running")
    assert run.code == 0
    assert run.of("run") == [run.joining]
    assert run.joining.count("--join_only") == 1
    assert run.of("rm") == []


def test_words_for_docker_run_are_for_joining_too(device):
    run = device.pi(
        *ARGUMENTS, f"--join={TOKEN}", DOCKER_RUN_OPTIONS="--network host --restart always"
    )
    words = run.joining[: run.joining.index("flower-embedded:cpu")]
    assert words[words.index("--network") :] == [
        "--network", "host", "--restart", "always", "--restart", "no", "--rm", "--interactive",
    ]  # fmt: skip


def test_server_found_by_multicast_is_found_while_joining(device):
    run = device.pi("--cid=0", "--server_address=laptop.local:8080", f"--join={TOKEN}")
    assert "laptop.local:192.168.1.77" in run.joining


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--join"], ["--join lacks a token"]),
        (["--join="], ["--join lacks a token"]),
        (["--join", "--model=Net"], ["--join lacks a token"]),
        (["--join=join1_a b"], ["--join has spaces or line breaks"]),
        (["--join=no/such file"], ["neither a token (join1_…", "nor a file"]),
        (["--join=."], ["neither a token"]),
        (["--join=-"], ["neither a token"]),  # with nothing on standard input
        ([f"--join={TOKEN}", "--insecure"], ["leave out --insecure"]),
        (["--join_only"], ["--join_only needs --join"]),
        (["--keys=here"], ["KEYS_VOLUME"]),
        (["--keys", "here"], ["KEYS_VOLUME"]),
        ([TOKEN], ["a token goes after --join="]),
        ([f"--token={TOKEN}"], ["a token goes after --join="]),
        (["--tokens", TOKEN], ["a token goes after --join="]),
    ],
)
def test_what_cannot_be_joined_with_is_refused_and_not_shown(device, script, arguments, parts):
    run = device.run(script, *ARGUMENTS, *arguments, board="jetson-r36.4")
    assert_refused(run, f"{script}: ", *parts)
    assert TOKEN not in run.err


def test_insecure_is_the_clients(device):
    run = device.pi(*ARGUMENTS, "--insecure")
    assert run.of("run") == [run.command]
    assert run.command[-1] == "--insecure"


def test_keys_volume_may_be_another_volume(device):
    run = device.pi(*ARGUMENTS, f"--join={TOKEN}", KEYS_VOLUME="mine")
    for call in (run.joining, run.command):
        assert "type=volume,source=mine,target=/keys" in call
        assert KEYS[1] not in call


def test_keys_volume_may_be_a_private_directory_and_is_made(device):
    device.shows_owner(1000)  # the number of Debian's first user
    run = device.pi(*ARGUMENTS, f"--join={TOKEN}", KEYS_VOLUME='disk/my "keys"')
    made = device.home / 'disk/my "keys"'
    assert made.stat().st_mode & 0o777 == 0o700
    quoted = str(made).replace('"', '""')
    for call in (run.joining, run.command):
        assert f'type=bind,"source={quoted}",target=/keys' in call


@pytest.mark.parametrize("owner, mode", [(1001, 0o700), (1000, 0o750), (1000, 0o701)])
def test_keys_directory_of_somebody_else_or_open_to_others_is_refused(device, owner, mode):
    keys = device.home / "keys"
    keys.mkdir(mode=0o700)
    keys.chmod(mode)
    device.shows_owner(owner)
    run = device.pi(*ARGUMENTS, KEYS_VOLUME="./keys")
    assert_refused(run, "KEYS_VOLUME './keys'", "sudo chown 1000", "chmod 700", calls=False)

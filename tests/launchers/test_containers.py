"""The container that a launcher starts: its options, volumes and name."""

import os
import pty
import re
import signal
import subprocess

import pytest

from tests.launchers.conftest import ARGUMENTS, BOARDS, VOLUME, assert_refused, container


def test_pi_builds_both_images_and_runs_the_client_in_the_foreground(device):
    run = device.pi(*ARGUMENTS)
    assert run.code == 0
    assert run.err == ""
    label = run.base_build[4]
    assert re.fullmatch(r"flower-embedded\.base=[0-9a-f]{16}", label)
    assert run.base_build == [
        "build", "--tag", "flower-embedded-base:cpu", "--label", label,
        "--file", f"{device.tree}/base_images/cpu/Dockerfile", f"{device.tree}/base_images",
    ]  # fmt: skip
    assert run.client_build == [
        "build", "--quiet", "--tag", "flower-embedded:cpu",
        "--build-arg", "BASE_IMAGE_TYPE=cpu",
        "--build-arg", "BASE_IMAGE=flower-embedded-base:cpu", str(device.tree),
    ]  # fmt: skip
    assert run.calls.index(run.base_build) < run.calls.index(run.client_build)
    assert run.command == [
        "run", *container(), *VOLUME, "--rm", "flower-embedded:cpu", *ARGUMENTS,
    ]  # fmt: skip
    assert "building flower-embedded-base:cpu, once" in run.out


def test_detached_container_comes_back_and_the_hints_name_it(device):
    run = device.pi("--detach", *ARGUMENTS)
    assert run.command == [
        "run", *container(), *VOLUME, "--detach", "--restart", "unless-stopped",
        "flower-embedded:cpu", *ARGUMENTS,
    ]  # fmt: skip
    for hint in ("logs --follow", "stop", "start", "rm --force"):
        assert f"docker {hint} flower-client-0" in run.out


@pytest.mark.parametrize("place", [0, 1, 3])
def test_detach_may_stand_anywhere(device, place):
    arguments = list(ARGUMENTS)
    arguments.insert(place, "--detach")
    run = device.pi(*arguments)
    assert "--restart" in run.command
    assert run.command[-3:] == ARGUMENTS


def test_exit_code_of_docker_run_is_the_launchers(device):
    assert device.pi(*ARGUMENTS, RUN_CODE="125").code == 125
    assert device.pi(*ARGUMENTS, "--detach", RUN_CODE="125").code == 125


def test_ctrl_c_reaches_docker_itself(device):
    process = device.popen("run_pi.sh", *ARGUMENTS, board="pi4", RUN_SLEEPS="1")
    assert process.stdout
    for line in process.stdout:
        if line == "client runs\n":
            break
    process.send_signal(signal.SIGINT)  # to the launcher's own process number
    assert process.wait(10) == -signal.SIGINT
    process.communicate()


@pytest.mark.parametrize(
    ("module", "file"), [("mine", "mine.py"), ("models.mine", "models/mine.py")]
)
def test_file_of_an_own_model_is_mounted_where_the_client_runs(device, module, file):
    path = device.home / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("class Mine: ...\n")
    arguments = [*ARGUMENTS[:2], f"--model={module}:Mine"]
    run = device.pi(*arguments)
    assert run.command == [
        "run", *container(), *VOLUME,
        "--mount", f'type=bind,"source={path}","target=/app/{file}",readonly',
        "--rm", "flower-embedded:cpu", *arguments,
    ]  # fmt: skip


def test_own_model_whose_file_is_not_here_ends_it(device):
    run = device.pi(*ARGUMENTS[:2], "--model=mine:Mine")
    problem = f"run_pi.sh: --model mine:Mine: there is no mine.py in '{device.home}'\n"
    assert_refused(run, problem, calls=False)


@pytest.mark.parametrize("detach", [False, True])
def test_terminal_is_passed_on_in_the_foreground_only(device, detach):
    outer, inner = pty.openpty()
    try:
        subprocess.run(
            [device.tree / "run_pi.sh", *ARGUMENTS, *["--detach"] * detach],
            env={**device.env, "BOARD_ROOT": str(BOARDS / "pi4")},
            stdin=inner, stdout=inner, stderr=inner, timeout=30, check=True,
        )  # fmt: skip
    finally:
        os.close(outer)
        os.close(inner)
    command = device.calls()[0][-1]
    assert ("--tty" in command) is (not detach)
    assert ("--interactive" in command) is (not detach)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--server_address", "192.168.1.10:8080", "--cid", "0"],
        ["--server-address=192.168.1.10:8080", "--cid=0"],
        ["--server-address", "192.168.1.10:8080", "--cid", "0", "--threads", "2"],
        ["--cid=0", "--server_address=[fd00::1]:8080", "--max_wait_seconds=1.5"],
        ["--cid=0", "--server_address=laptop:8080", "--new_flag", "a b", '--note=it\'s "$HOME"'],
        ["--cid=0", "--server_address=10.0.0.1:80", "--data_dir=synthetic:400", "--model="],
        ["--cid=0", "--server_address=10.0.0.1:80", "--data-dir", "synthetic"],
    ],
)
def test_clients_arguments_go_through_unchanged(device, arguments):
    run = device.pi(*arguments)
    assert run.command == [
        "run", *container(), *VOLUME, "--rm", "flower-embedded:cpu", *arguments,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["images", "my images", 'a,b "c"', "ünï 'x' $HOME"])
@pytest.mark.parametrize("form", ["--data_dir={}", "--data-dir={}", "--data_dir {}"])
def test_own_images_are_mounted_read_only_where_they_are(device, name, form):
    images = device.home / name
    images.mkdir()
    flag = [part.format(name) for part in form.split(" ", 1)]
    run = device.pi(*flag, *ARGUMENTS)
    quoted = str(images).replace('"', '""')
    assert run.command == [
        "run", *container(),
        "--mount", f'type=bind,"source={quoted}","target={quoted}",readonly',
        "--rm", "flower-embedded:cpu", f"--data_dir={images}", *ARGUMENTS,
    ]  # fmt: skip


def test_data_dir_that_is_not_there_is_named_before_docker_is_asked(device):
    run = device.pi(*ARGUMENTS, "--data_dir=no/such place")
    assert_refused(run, "run_pi.sh: --data_dir 'no/such place' is no directory", calls=False)


def test_data_volume_may_be_another_volume(device):
    run = device.pi(*ARGUMENTS, DATA_VOLUME="cifar")
    assert "type=volume,source=cifar,target=/data" in run.command


def test_data_volume_may_be_a_directory_and_is_made(device):
    run = device.pi(*ARGUMENTS, DATA_VOLUME="disk/my data")
    made = device.home / "disk/my data"
    assert made.is_dir()
    assert f'type=bind,"source={made}",target=/data' in run.command
    assert ("sudo chown 1000 'disk/my data'" in run.err) is (made.stat().st_uid != 1000)


def test_further_words_for_docker_come_last(device):
    run = device.pi(
        *ARGUMENTS,
        DOCKER_BUILD_OPTIONS="--network host",
        DOCKER_RUN_OPTIONS="--memory 1g --tmpfs *",
    )
    assert run.base_build[-3:-1] == ["--network", "host"]
    assert run.client_build[-3:-1] == ["--network", "host"]
    assert run.command == [
        "run", *container(), *VOLUME, "--rm", "--memory", "1g", "--tmpfs", "*",
        "flower-embedded:cpu", *ARGUMENTS,
    ]  # fmt: skip


def test_running_client_of_the_same_cid_is_named_and_replaced(device):
    run = device.pi(*ARGUMENTS, OLD_CONTAINER="running")
    assert "replacing the container flower-client-0 (running)" in run.out
    assert run.of("rm") == [["rm", "--force", "--volumes", "flower-client-0"]]
    order = [call[0] for call in run.calls]
    assert order.index("rm") > max(n for n, word in enumerate(order) if word == "build")


def test_client_that_cannot_be_replaced_ends_it(device):
    run = device.pi(*ARGUMENTS, OLD_CONTAINER="running", RM_FAILS="1")
    assert run.code == 1
    assert run.of("run") == []


def test_clients_with_different_cids_do_not_clash(device):
    for cid in ("0", "kitchen.2", "_x"):
        run = device.pi("--server_address=10.0.0.1:80", f"--cid={cid}")
        assert run.command[1:3] == ["--name", f"flower-client-{cid}"]
        assert run.of("rm") == []
        assert "replacing" not in run.out


def test_multicast_name_is_resolved_on_the_host(device):
    run = device.pi("--cid=0", "--server_address=laptop.local:8080")
    place = run.command.index("--add-host")
    assert run.command[place + 1] == "laptop.local:192.168.1.77"
    assert run.command[-1] == "--server_address=laptop.local:8080"


def test_unknown_multicast_name_is_a_warning(device):
    run = device.pi("--cid=0", "--server_address=other.local:8080")
    assert run.code == 0
    assert "--add-host" not in run.command
    assert "warning: cannot find other.local from here; take the IP address" in run.err

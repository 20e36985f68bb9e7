"""run_pi.sh and run_jetson.sh: what they check, say, build and run.

The scripts are real; the board is one of tests/boards (nv_tegra_release lines as published,
/proc/meminfo with the lines that matter), and `docker` is a stand-in that writes down its
arguments. PATH holds that, some more stand-ins, and what every Debian has.
"""

import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

BOARDS = ROOT / "tests/boards"
IGPU = "nvcr.io/nvidia/pytorch:25.06-py3-igpu"
SBSA = "nvcr.io/nvidia/pytorch:25.10-py3"
ARGUMENTS = ["--server_address=192.168.1.10:8080", "--cid=0", "--model=Net"]

# What Debian has on every board: bash, coreutils, findutils, mawk.
DEBIAN = [
    "awk", "bash", "cat", "cut", "dirname", "env", "find", "grep", "id", "mkdir", "realpath",
    "sed", "sha256sum", "sort", "stat", "tail", "tr",
]  # fmt: skip

DOCKER = """#!/usr/bin/env bash
# Writes down its arguments and answers as the test says.
{ printf '%s\\x1f' "BUILDKIT=${DOCKER_BUILDKIT-}" "$@"; printf '\\x1e'; } >>"$STAND_IN/calls"
case $* in
  "version --format"*)
    [[ -z ${DOCKER_PROBLEM-} ]] || exit 1
    echo "${DOCKER_VERSION:-arm64 28.2.2 28.2.2}" ;;
  version)
    echo "$DOCKER_PROBLEM" >&2
    exit 1 ;;
  "buildx version") [[ -z ${NO_BUILDX-} ]] ;;
  *DockerRootDir*) echo /var/lib/docker ;;
  *json\\ .Runtimes*)
    [[ -n ${DOCKER_RUNTIMES-} ]] || DOCKER_RUNTIMES='{"nvidia":{"path":"x"},"runc":{"path":"runc"}}'
    echo "$DOCKER_RUNTIMES" ;;
  "image inspect"*)
    name=${*: -1}
    [[ -e $STAND_IN/images/${name//\\//_} ]] && cat "$STAND_IN/images/${name//\\//_}" ;;
  "container inspect"*) [[ -n ${OLD_CONTAINER-} ]] && echo "$OLD_CONTAINER" ;;
  rm*) [[ -z ${RM_FAILS-} ]] ;;
  pull*) [[ -z ${PULL_FAILS-} ]] ;;
  build*)
    if [[ -n ${BUILD_FAILS-} && $* == *"$BUILD_FAILS"* ]]; then
      echo "ERROR: no space left on device" >&2
      exit 17
    fi
    echo "built: progress" ;;
  run*--join_only)
    printf '%s\n' "$(env)" >"$STAND_IN/joining-environment"
    [[ -z ${JOIN_SLEEPS-} ]] || { echo "joining" && sleep 60; }
    cat >"$STAND_IN/joining-input"
    exit "${JOIN_CODE:-0}" ;;
  run*)
    [[ -z ${RUN_SLEEPS-} ]] || { echo "client runs"; exec sleep 60; }
    echo "container id"
    exit "${RUN_CODE:-0}" ;;
esac
"""
STAND_INS = {
    "docker": DOCKER,
    "uname": '#!/usr/bin/env bash\necho "${MACHINE:-aarch64}"\n',
    "getconf": '#!/usr/bin/env bash\necho "${BITS:-64}"\n',
    "df": '#!/usr/bin/env bash\nprintf "%s\\n" Avail "${FREE_MB:-40000}MB"\n',
    "timeout": '#!/usr/bin/env bash\nexit "${SERVER_GONE:-0}"\n',
    "dpkg-query": '#!/usr/bin/env bash\n[[ -n ${L4T_PACKAGE-} ]] && printf %s "$L4T_PACKAGE"\n',
    "getent": """#!/usr/bin/env bash
case $* in
  "group video") echo "video:x:44:pi" ;;
  "group render") echo "render:x:104:" ;;
  "ahostsv4 laptop.local") printf '192.168.1.77  %s\\n' 'STREAM laptop.local' DGRAM RAW ;;
  *) exit 2 ;;
esac
""",
}


@dataclass
class Run:
    """What a launcher said and which calls of docker it made."""

    code: int
    out: str
    err: str
    calls: list[list[str]] = field(default_factory=list)
    buildkit: str = ""

    def of(self, *words: str) -> list[list[str]]:
        """Return the calls that begin with these words."""
        return [call for call in self.calls if call[: len(words)] == list(words)]

    @property
    def base_build(self) -> list[str]:
        (call,) = [call for call in self.of("build") if "--label" in call]
        return call

    @property
    def client_build(self) -> list[str]:
        (call,) = [call for call in self.of("build") if "--label" not in call]
        return call

    @property
    def command(self) -> list[str]:
        """The container's command, the last call of all."""
        (call,) = [call for call in self.of("run") if call[-1] != "--join_only"]
        assert call is self.calls[-1]
        return call

    @property
    def joining(self) -> list[str]:
        """The command of the container that joins."""
        (call,) = [call for call in self.of("run") if call[-1] == "--join_only"]
        return call


class Device:
    """A board with a checkout of the project, Docker and a shell."""

    def __init__(self, home: Path) -> None:
        self.bin = home / "bin"
        self.bin.mkdir(parents=True)
        for tool in [*DEBIAN, "sleep"]:  # sleep is for the stand-in
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        for name, text in STAND_INS.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        self.tree = home / "my checkout"
        for kind in ("cpu", "gpu", "engine"):
            (self.tree / "base_images" / kind).mkdir(parents=True)
            (self.tree / "base_images" / kind / "Dockerfile").write_text(f"FROM {kind}\n")
        (self.tree / "base_images/requirements.txt").write_text("grpcio==1.85.1\n")
        (self.tree / "plumbing").mkdir()
        for script in (
            "run_pi.sh",
            "run_jetson.sh",
            "plumbing/launch.sh",
            "plumbing/models.sh",
            "plumbing/supernode.sh",
            "utils.py",
        ):
            shutil.copy(ROOT / script, self.tree / script)
        self.state = home / "stand-in"
        (self.state / "images").mkdir(parents=True)
        self.env = {"PATH": str(self.bin), "STAND_IN": str(self.state), "HOME": str(home)}
        self.home = home

    def has_image(self, name: str, label: str = "") -> None:
        (self.state / "images" / name.replace("/", "_")).write_text(label + "\n")

    def shows_owner(self, uid: int) -> None:
        """Let `stat` say that this user owns everything."""
        (self.bin / "stat").unlink()
        (self.bin / "stat").write_text(
            f'#!/bin/bash\nshown=$({shutil.which("stat")} "$@") && echo "{uid} ${{shown#* }}"\n'
        )
        (self.bin / "stat").chmod(0o755)

    def popen(
        self,
        script: str,
        *arguments: str,
        board: str,
        stdin: int = subprocess.DEVNULL,
        group: bool = False,
        **env: str,
    ) -> subprocess.Popen[str]:
        calls = self.state / "calls"
        calls.unlink(missing_ok=True)
        return subprocess.Popen(
            [str(self.tree / script), *arguments],
            env={**self.env, "BOARD_ROOT": str(BOARDS / board), **env},
            cwd=self.home,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=group,
        )

    def run(
        self, script: str, *arguments: str, board: str, text: str | None = None, **env: str
    ) -> Run:
        stdin = subprocess.DEVNULL if text is None else subprocess.PIPE
        process = self.popen(script, *arguments, board=board, stdin=stdin, **env)
        out, err = process.communicate(text, timeout=30)
        calls, buildkit = self.calls()
        return Run(process.returncode, out, err, calls, buildkit)

    def calls(self) -> tuple[list[list[str]], str]:
        path = self.state / "calls"
        records = path.read_text().split("\x1e")[:-1] if path.exists() else []
        fields = [record.split("\x1f")[:-1] for record in records]
        builds = {call[0] for call in fields if call[1] == "build"}
        return [call[1:] for call in fields], "".join(builds)

    def pi(self, *arguments: str, board: str = "pi4", **options: Any) -> Run:
        return self.run("run_pi.sh", *arguments, board=board, **options)

    def jetson(self, *arguments: str, board: str = "jetson-r36.4", **options: Any) -> Run:
        return self.run("run_jetson.sh", *arguments, board=board, **options)


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path / "home")


KEYS = ["--mount", "type=volume,source=flower-keys,target=/keys"]


def container(
    name: str = "flower-client-0", *, model: str = "Raspberry Pi 4 Model B Rev 1.4"
) -> list[str]:
    """The options that each container gets, in their order."""
    return [
        "--name", name, "--init",
        "--log-driver", "json-file", "--log-opt", "max-size=10m", "--log-opt", "max-file=3",
        "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
        "--env", f"DEVICE_MODEL={model}", *KEYS,
    ]  # fmt: skip


VOLUME = ["--mount", "type=volume,source=flower-data,target=/data"]


def assert_refused(run: Run, *parts: str, calls: bool = True) -> None:
    """One line on stderr with these parts, exit code 1, nothing built or run."""
    assert run.code == 1
    assert run.err.count("\n") == 1, run.err
    for part in parts:
        assert part in run.err
    assert not run.of("build")
    assert not run.of("pull")
    assert not run.of("run")
    assert calls or run.calls == []


# The container


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


# Joining a server with --secure

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


# Images


def label_of(run: Run) -> str:
    return run.base_build[4].partition("=")[2]


def test_base_image_is_built_again_when_its_files_have_changed(device):
    label = label_of(device.pi(*ARGUMENTS))
    device.has_image("flower-embedded-base:cpu", label)
    again = device.pi(*ARGUMENTS)
    assert len(again.of("build")) == 1  # the client's, from its cache where nothing changed
    assert again.client_build

    (device.tree / "base_images/README.md").write_text("words\n")
    (device.tree / "base_images/cpu/README.md").write_text("words\n")
    (device.tree / "base_images/gpu/Dockerfile").write_text("FROM other\n")
    assert len(device.pi(*ARGUMENTS).of("build")) == 1

    (device.tree / "base_images/requirements.txt").write_text("grpcio==1.85.2\n")
    second = label_of(device.pi(*ARGUMENTS))
    (device.tree / "base_images/cpu/Dockerfile").write_text("FROM newer\n")
    third = label_of(device.pi(*ARGUMENTS))
    assert len({label, second, third}) == 3


def test_checkout_without_base_images_ends_it(device):
    shutil.rmtree(device.tree / "base_images/cpu")
    run = device.pi(*ARGUMENTS)
    assert run.code != 0
    assert run.of("build") == []
    assert run.of("run") == []


def test_base_image_of_another_origin_is_built_again(device):
    device.has_image("flower-embedded-base:cpu", "")
    assert device.pi(*ARGUMENTS).base_build


def test_base_image_is_pulled_once_where_one_is_named(device):
    name = "registry.example:5000/me/base:cpu"
    run = device.pi(*ARGUMENTS, BASE_IMAGE=name)
    assert run.of("pull") == [["pull", name]]
    assert f"BASE_IMAGE={name}" in run.client_build
    assert len(run.of("build")) == 1
    assert run.command[-4] == "flower-embedded:cpu"
    device.has_image(name)
    assert device.pi(*ARGUMENTS, BASE_IMAGE=name).of("pull") == []


def test_failed_pull_ends_it(device):
    run = device.pi(*ARGUMENTS, BASE_IMAGE="me/base:cpu", PULL_FAILS="1")
    assert run.code == 1
    assert "cannot pull BASE_IMAGE 'me/base:cpu'" in run.err
    assert run.calls[-1] == ["pull", "me/base:cpu"]


@pytest.mark.parametrize("here", [True, False])
def test_ready_image_is_used_and_none_is_built(device, here):
    if here:
        device.has_image("fleet/client:7", "")
    run = device.pi(*ARGUMENTS, "--image=fleet/client:7")
    assert run.code == 0, run.err
    assert not run.of("build")
    assert [call[-1] for call in run.of("pull")] == ([] if here else ["fleet/client:7"])
    assert "fleet/client:7" in run.command
    assert not any(word.startswith("--image") for word in run.command)


def test_ready_image_that_is_nowhere_ends_it(device):
    run = device.pi(*ARGUMENTS, "--image=fleet/client:7", PULL_FAILS="1")
    assert run.code == 1
    assert "no image 'fleet/client:7' here, and it cannot be pulled" in run.err
    assert not run.of("run")


@pytest.mark.parametrize("image", ["flower-embedded-base:cpu", "flower-embedded:cpu"])
def test_failed_build_ends_it_and_no_old_image_runs(device, image):
    device.has_image("flower-embedded-base:cpu", "old")
    run = device.pi(*ARGUMENTS, BUILD_FAILS=f"--tag {image} ", OLD_CONTAINER="running")
    assert run.code == 1
    assert "ERROR: no space left on device" in run.err
    assert f"run_pi.sh: building {image} failed" in run.err
    assert run.of("run") == []
    assert run.of("rm") == []


@pytest.mark.parametrize(
    "version, no_buildx, buildkit",
    [("20.10.24+dfsg1", "1", "1"), ("26.1.5", "1", "0"), ("26.1.5", "", "1"), ("29.0.0", "", "1")],
)
def test_buildkit_is_used_where_docker_has_it(device, version, no_buildx, buildkit):
    run = device.pi(*ARGUMENTS, DOCKER_VERSION=f"arm64 {version} {version}", NO_BUILDX=no_buildx)
    assert run.code == 0
    assert run.buildkit == f"BUILDKIT={buildkit}"


# Checks


@pytest.mark.parametrize("script", ["run_pi.sh", "run_jetson.sh"])
@pytest.mark.parametrize(
    "arguments, parts",
    [
        ([], ["--server_address is missing", "--cid="]),
        (["--cid=0"], ["--server_address is missing", "--server_address=192.168.1.10:8080"]),
        (["--server_address=10.0.0.1:80"], ["--cid is missing", "--cid="]),
        (["--server_address=10.0.0.1:80", "--cid"], ["--cid is missing"]),
        (["--server_address=10.0.0.1:80", "--cid", "--detach"], ["--cid is missing"]),
        (["--server_address", "--cid=0"], ["--server_address is missing"]),
        (["--server_address=10.0.0.1:80", "--cid=a b"], ["--cid 'a b'", "letters"]),
        (["--server_address=10.0.0.1:80", "--cid=" + "x" * 65], ["--cid 'xxx", "64"]),
        (["--server_address=10.0.0.1:80", "--cid=../x"], ["--cid '../x'"]),
        (["--server_address=10.0.0.1:80", "--cid=-h"], ["--cid '-h'", "no '-' in front"]),
        (["--server_address=10.0.0.1", "--cid=0"], ["'10.0.0.1' is not HOST:PORT"]),
        (["--server_address=fd00::1:80", "--cid=0"], ["'fd00::1:80' is not HOST:PORT"]),
        (["--server_address=http://a:80", "--cid=0"], ["name of a protocol; leave it out: a:80"]),
        (["--server_address=0.0.0.0:80", "--cid=0"], ["use the one that server.py prints"]),
        (["--server_address=[::]:80", "--cid=0"], ["use the one that server.py prints"]),
        (["--server_address=a:80", "--cid=0", "--model=net"], ["no model 'net'", "has Net, PiNet"]),
        (["--server_address=$(reboot):80/x", "--cid=0"], ["is not HOST:PORT"]),
    ],
)
def test_wrong_arguments_are_reported_before_anything_else(device, script, arguments, parts):
    run = device.run(script, *arguments, board="jetson-r36.4")
    assert_refused(run, f"{script}: ", *parts, calls=False)


def test_pi_has_no_cuda(device):
    run = device.pi(*ARGUMENTS, "--device=cuda")
    assert_refused(run, "--device cuda", "./run_jetson.sh", calls=False)


@pytest.mark.parametrize(
    "env, parts",
    [
        ({"MACHINE": "armv7l"}, ["32 bits (armv7l)", "Raspberry Pi OS (64-bit)"]),
        ({"MACHINE": "armv6l"}, ["32 bits (armv6l)"]),
        ({"MACHINE": "riscv64"}, ["riscv64"]),
        ({"BITS": "32"}, ["64-bit kernel", "32-bit", "Raspberry Pi OS (64-bit)"]),
        ({"DOCKER_VERSION": "arm 28.2.2 28.2.2"}, ["Docker has 32 bits (arm)", "arm64"]),
        ({"DOCKER_VERSION": "arm64 20.10.7 20.10.7"}, ["Docker 20.10.7 is older", "apt upgrade"]),
        ({"DOCKER_VERSION": "arm64 19.03.6 19.03.6"}, ["Docker 19.03.6 is older"]),
        ({"FREE_MB": "3999"}, ["3999 MB are free in /var/lib/docker", "4000 MB", "prune"]),
        (
            {
                "DOCKER_PROBLEM": "Cannot connect to the Docker daemon at unix:///var/run/docker.sock"
            },
            ["Docker does not run (Cannot connect", "sudo systemctl enable --now docker"],
        ),
        (
            {"DOCKER_PROBLEM": "permission denied while trying to connect to the Docker daemon"},
            ["may not use Docker", "sudo usermod -aG docker $USER", "log out and in"],
        ),
        (
            {"DOCKER_PROBLEM": "Got permission denied while trying to connect"},  # 20.10's words
            ["may not use Docker", "sudo usermod -aG docker $USER"],
        ),
    ],
)
def test_unfit_board_is_refused_with_what_to_do(device, env, parts):
    assert_refused(device.pi(*ARGUMENTS, **env), "run_pi.sh: ", *parts)


@pytest.mark.parametrize("script", ["run_pi.sh", "run_jetson.sh"])
def test_missing_docker_is_reported_with_the_command_that_installs_it(device, script):
    (device.bin / "docker").unlink()
    run = device.run(script, *ARGUMENTS, board="jetson-r36.4")
    assert_refused(run, f"{script}: Docker is not installed", "get.docker.com", "usermod")


@pytest.mark.parametrize("env", [{"BITS": "64"}, {"DOCKER_VERSION": "amd64 27.5.1 27.5.1"}])
def test_64_bit_systems_pass(device, env):
    assert device.pi(*ARGUMENTS, **env).code == 0


def test_disk_is_looked_at_only_where_an_image_is_to_be_made(device):
    device.has_image("flower-embedded-base:cpu", label_of(device.pi(*ARGUMENTS)))
    assert device.pi(*ARGUMENTS, FREE_MB="100").code == 0
    refused = device.pi(*ARGUMENTS, FREE_MB="100", BASE_IMAGE="me/base")
    assert_refused(refused, "100 MB are free")


@pytest.mark.parametrize("board", ["pi3", "pi4"])
def test_board_with_room_for_pytorch_passes_without_a_word(device, board):
    run = device.pi(*ARGUMENTS, board=board)
    assert run.code == 0
    assert run.err == ""


def test_little_memory_is_a_warning_that_names_swap(device):
    run = device.pi(*ARGUMENTS, board="zero2w")
    assert run.code == 0
    assert run.command
    assert run.err.count("\n") == 1
    assert "run_pi.sh: warning: 416 MB of RAM and 416 MB of swap" in run.err
    assert "the system and PyTorch want 700 MB" in run.err
    assert "add swap: sudo fallocate -l 1G /swap" in run.err


def test_memory_with_swap_enough_is_a_shorter_warning(device, tmp_path):
    board = tmp_path / "zero2w"
    shutil.copytree(BOARDS / "zero2w", board)
    meminfo = board / "proc/meminfo"
    meminfo.write_text(re.sub(r"(SwapTotal: *)\d+", r"\g<1>1474632", meminfo.read_text()))
    run = device.pi(*ARGUMENTS, BOARD_ROOT=str(board))
    assert "1440 MB of swap" in run.err
    assert "be slow" in run.err
    assert "fallocate" not in run.err


def test_silent_server_is_a_warning_only(device):
    run = device.pi(*ARGUMENTS, SERVER_GONE="124")
    assert run.code == 0
    assert "warning: no answer from 192.168.1.10:8080 yet" in run.err
    assert run.command


def test_servers_port_is_really_tried(device):
    (device.bin / "timeout").unlink()
    (device.bin / "timeout").symlink_to(str(shutil.which("timeout")))
    host = {"DOCKER_RUN_OPTIONS": "--network host"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert device.pi("--cid=0", f"--server_address={address}", **host).err == ""
    run = device.pi("--cid=0", f"--server_address={address}", **host)
    assert f"warning: no answer from {address} yet" in run.err


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_localhost_is_the_container_itself(device, host):
    run = device.pi("--cid=0", f"--server_address={host}:8080")
    assert "is the container itself" in run.err
    assert run.code == 0
    shared = {"DOCKER_RUN_OPTIONS": "--net=host"}
    assert device.pi("--cid=0", f"--server_address={host}:8080", **shared).err == ""


@pytest.mark.parametrize("script", ["run_pi.sh", "run_jetson.sh"])
def test_sh_runs_them_with_bash(device, script):
    arguments = [str(shutil.which("sh")), str(device.tree / script), "--help"]
    run = subprocess.run(arguments, env=device.env, capture_output=True, text=True, timeout=30)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"./{script} --server_address" in run.stdout


# A SuperNode of Flower's engine

SUPERLINK = ["--superlink=192.168.1.10:8000", "--cid=0"]


def supernode(*mounts: str) -> list[str]:
    """The options of a SuperNode's container: no key of the stream, and no client.py."""
    options = [option for option in container("flower-client-0") if option not in KEYS]
    return [*options, *VOLUME, *mounts, "--entrypoint", "flower-supernode", "--no-healthcheck"]


def test_superlink_runs_a_supernode_in_an_image_of_its_own(device):
    run = device.pi(*SUPERLINK, "--insecure", "--threads", "2", "--device=cpu")
    assert (run.code, run.err) == (0, "")
    client, engine = (call for call in run.of("build") if "--label" in call)
    assert client[1:3] == ["--tag", "flower-embedded-base:cpu"]
    assert engine == [
        "build", "--tag", "flower-embedded-base:engine", "--label", engine[4],
        "--build-arg", "BASE=flower-embedded-base:cpu",
        "--file", f"{device.tree}/base_images/engine/Dockerfile", f"{device.tree}/base_images",
    ]  # fmt: skip
    assert run.client_build == [
        "build", "--quiet", "--tag", "flower-embedded:engine",
        "--build-arg", "BASE_IMAGE_TYPE=engine",
        "--build-arg", "BASE_IMAGE=flower-embedded-base:engine", str(device.tree),
    ]  # fmt: skip
    assert run.command == [
        "run", *supernode(), "--rm", "flower-embedded:engine", "--superlink", "192.168.1.10:8000",
        "--node-config", "cid='0' threads=2 device='cpu' data-dir='/data' download=true",
        "--insecure",
    ]  # fmt: skip


def test_client_builds_nothing_of_the_engine(device):
    run = device.pi(*ARGUMENTS)
    assert not [word for call in run.of("build") for word in call if "engine" in word]


def test_changed_client_base_builds_the_engines_again(device):
    run = device.pi(*SUPERLINK)
    for call in run.of("build"):
        if "--label" in call:
            device.has_image(call[2], call[4].partition("=")[2])
    assert not [call for call in device.pi(*SUPERLINK).of("build") if "--label" in call]
    (device.tree / "base_images/cpu/Dockerfile").write_text("FROM changed\n")
    run = device.pi(*SUPERLINK)
    assert [call[2] for call in run.of("build") if "--label" in call] == [
        "flower-embedded-base:cpu", "flower-embedded-base:engine",
    ]  # fmt: skip


def test_supernode_gets_its_key_its_certificate_and_its_images(device):
    images = device.home / "my images"
    images.mkdir()
    files = {"ca.crt": "root-certificates", "key": "auth-supernode-private-key"}
    for name in files:
        (device.home / name).write_text(name)
        (device.home / name).chmod(0o644)
    flags = [f"--{flag}={name}" for name, flag in files.items()]
    run = device.pi(*SUPERLINK, *flags, "--data_dir", str(images), "--max-retries", "3")
    assert run.err == ""
    mounts = {images: images, device.home / "ca.crt": "/run/supernode/ca.crt",
              device.home / "key": "/run/supernode/key"}  # fmt: skip
    assert run.command == [
        "run",
        *supernode(*[
            word for source, target in mounts.items()
            for word in ("--mount", f'type=bind,"source={source}","target={target}",readonly')
        ]),
        "--rm", "flower-embedded:engine", "--superlink", "192.168.1.10:8000",
        "--node-config", f"cid='0' data-dir='{images}'",
        "--root-certificates", "/run/supernode/ca.crt",
        "--auth-supernode-private-key", "/run/supernode/key",
        "--max-retries", "3",
    ]  # fmt: skip


@pytest.mark.parametrize("board", ["pi3", "zero2w"])
def test_board_with_less_than_1500_mb_runs_no_supernode(device, board):
    run = device.pi(*SUPERLINK, board=board)
    assert_refused(run, "MB of RAM", "a SuperNode takes", "1,500 MB are wanted")
    with_swap = "has 909 MB" if board == "pi3" else "has 416 MB"
    assert with_swap in run.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--superlink", "--cid=0"], "--superlink lacks HOST:PORT"),
        (["--superlink=laptop", "--cid=0"], "server address 'laptop' is not HOST:PORT"),
        (["--superlink=laptop:8000"], "--cid is missing"),
        ([*SUPERLINK, "--server_address=laptop:8080"], "give one of them"),
        ([*SUPERLINK, "--model=PiNet"], "flwr run . --run-config \"model='PiNet'\""),
        ([*SUPERLINK, "--stay"], "--stay is for server.py"),
        ([*SUPERLINK, "--threads=two"], "--threads 'two' is not a whole number above 0"),
        ([*SUPERLINK, "--node-config=a=1"], "--node-config is made of --cid"),
        ([*SUPERLINK, "--root-certificates=ca"], "--root-certificates 'ca' is no file"),
    ],
)
def test_wrong_argument_for_a_supernode_is_named(device, arguments, message):
    assert_refused(device.pi(*arguments), "run_pi.sh: ", message, calls=False)


def test_key_that_the_container_cannot_read_is_named(device):
    (device.home / "key").write_text("key")
    (device.home / "key").chmod(0o600)
    device.shows_owner(0)
    run = device.pi(*SUPERLINK, "--auth-supernode-private-key=key")
    assert_refused(run, "sudo chown 1000 'key'", calls=False)


def test_jetson_has_no_supernode(device):
    assert_refused(device.jetson(*SUPERLINK), "--superlink", "use ./run_pi.sh", calls=False)


# Help


@pytest.mark.parametrize("script", ["run_pi.sh", "run_jetson.sh"])
@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [*ARGUMENTS, "--help"]])
def test_help_needs_no_docker_and_no_board(device, script, arguments):
    (device.bin / "docker").unlink()
    run = device.run(script, *arguments, board="nowhere", MACHINE="armv7l")
    assert run.code == 0
    assert run.err == ""
    assert f"./{script} --server_address" in run.out
    assert "--detach" in run.out


@pytest.mark.parametrize("script", ["run_pi.sh", "run_jetson.sh"])
def test_help_names_the_clients_flags(device, script):
    flags = r"^  (?:-h, )?--([a-z_]+)"
    client = subprocess.run(
        [sys.executable, ROOT / "client.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    named = re.findall(flags, device.run(script, "--help", board="pi4").out, re.MULTILINE)
    assert sorted(named) == sorted(
        {*re.findall(flags, client, re.MULTILINE)} - {"help", "keys"} | {"detach", "image"}
    )


# Jetson


def jetson_container(shm: str, model: str) -> list[str]:
    plain = container(model=model)
    place = plain.index("--env")
    return [
        *plain[:place], "--runtime", "nvidia", "--shm-size", shm,
        "--group-add", "44", "--group-add", "104", *plain[place:],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "board, nvidia_image, shm, model",
    [
        (
            "jetson-r36.4",
            IGPU,
            "1905m",
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        ),
        ("jetson-r38.2", SBSA, "8192m", "NVIDIA Jetson AGX Thor Developer Kit"),
        ("jetson-r39.2", SBSA, "8192m", "NVIDIA Jetson AGX Orin Developer Kit"),
    ],
)
def test_jetson_gets_the_image_of_its_release(device, board, nvidia_image, shm, model):
    run = device.jetson(*ARGUMENTS, board=board)
    assert run.code == 0
    assert run.err == ""
    label = run.base_build[4]
    assert run.base_build == [
        "build", "--tag", "flower-embedded-base:gpu", "--label", label,
        "--build-arg", f"BASE={nvidia_image}",
        "--file", f"{device.tree}/base_images/gpu/Dockerfile", f"{device.tree}/base_images",
    ]  # fmt: skip
    assert run.client_build == [
        "build", "--quiet", "--tag", "flower-embedded:gpu",
        "--build-arg", "BASE_IMAGE_TYPE=gpu",
        "--build-arg", "BASE_IMAGE=flower-embedded-base:gpu", str(device.tree),
    ]  # fmt: skip
    assert run.command == [
        "run", *jetson_container(shm, model), *VOLUME, "--rm", "flower-embedded:gpu", *ARGUMENTS,
    ]  # fmt: skip
    assert f"building flower-embedded-base:gpu on {nvidia_image}, once" in run.out


def test_detached_jetson_comes_back(device):
    run = device.jetson(*ARGUMENTS, "--device=cuda", "--detach")
    assert run.command[-8:] == [
        "--detach", "--restart", "unless-stopped",
        "flower-embedded:gpu", *ARGUMENTS, "--device=cuda",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "board, model, parts",
    [
        ("jetson-r32.7", "NVIDIA Jetson Nano Developer Kit", ["R32.7", "Python 3.11"]),
        ("jetson-r35.4", "NVIDIA Jetson Xavier NX Developer Kit", ["R35.4", "Python 3.11"]),
        ("jetson-r36.3", "NVIDIA Jetson AGX Orin Developer Kit", ["R36.3", "JetPack 6.1 or later"]),
    ],
)
def test_older_jetpack_gives_the_reason_and_runs_the_cpu_image(device, board, model, parts):
    run = device.jetson("--detach", *ARGUMENTS, board=board)
    assert run.code == 0
    for part in [*parts, "training on the CPU"]:
        assert part in run.err
    assert run.err.count("\n") == 1
    assert run.command == [
        "run", *container(model=model), *VOLUME, "--detach", "--restart", "unless-stopped",
        "flower-embedded:cpu", *ARGUMENTS,
    ]  # fmt: skip


@pytest.mark.parametrize("board", ["jetson-r32.7", "jetson-r35.4", "jetson-r36.3"])
def test_cuda_demanded_of_an_older_jetpack_is_refused_at_once(device, board):
    run = device.jetson(*ARGUMENTS, "--device", "cuda", board=board)
    assert_refused(run, "run_jetson.sh: --device cuda: L4T R3", calls=False)


@pytest.mark.parametrize(
    "version, image",
    [
        ("36.4.3-20250107174145", "gpu"),
        ("36.5.0-20260115194252", "gpu"),
        ("38.4.0-20251230160601", "gpu"),
        ("36.2.0-20231218214829", "cpu"),
        ("35.6.0-20240825164610", "cpu"),
        ("32.7.6-20241104234540", "cpu"),
    ],
)
def test_package_gives_the_release_where_the_file_is_missing(device, version, image):
    run = device.jetson(*ARGUMENTS, board="pi4", L4T_PACKAGE=version)
    assert f"flower-embedded:{image}" in run.command


def test_file_counts_before_the_package(device):
    run = device.jetson(*ARGUMENTS, board="jetson-r36.3", L4T_PACKAGE="36.4.3-20250107174145")
    assert "R36.3" in run.err


def test_unreadable_release_file_leaves_it_to_the_package(device, tmp_path):
    board = tmp_path / "odd"
    shutil.copytree(BOARDS / "jetson-r36.4", board)
    (board / "etc/nv_tegra_release").write_text("torn\n")
    run = device.jetson(*ARGUMENTS, BOARD_ROOT=str(board), L4T_PACKAGE="38.2.0-20250821174705")
    assert f"BASE={SBSA}" in run.base_build


@pytest.mark.parametrize("env", [{}, {"MACHINE": "x86_64"}])
def test_board_that_is_no_jetson_is_sent_to_run_pi(device, env):
    run = device.jetson(*ARGUMENTS, board="pi4", **env)
    assert_refused(run, "run_jetson.sh: this is no Jetson", "./run_pi.sh", calls=False)


def test_missing_nvidia_runtime_is_reported_with_the_commands_that_add_it(device):
    run = device.jetson(
        *ARGUMENTS, DOCKER_RUNTIMES=json.dumps({"runc": {"path": "/opt/nvidia/runc"}})
    )
    assert_refused(run, "NVIDIA's runtime", "nvidia-ctk runtime configure --runtime=docker")


def test_jetson_needs_25_gb_for_its_image(device):
    assert_refused(device.jetson(*ARGUMENTS, FREE_MB="24999"), "24999 MB are free", "25000 MB")


def test_gpu_base_image_follows_its_own_files(device):
    old = label_of(device.jetson(*ARGUMENTS))
    device.has_image("flower-embedded-base:gpu", old)
    (device.tree / "base_images/cpu/Dockerfile").write_text("FROM newer\n")
    assert len(device.jetson(*ARGUMENTS).of("build")) == 1
    (device.tree / "base_images/gpu/Dockerfile").write_text("FROM newer\n")
    assert label_of(device.jetson(*ARGUMENTS)) != old


def test_upgraded_jetpack_gets_a_new_base_image(device):
    old = label_of(device.jetson(*ARGUMENTS, board="jetson-r36.4"))
    device.has_image("flower-embedded-base:gpu", old)
    assert len(device.jetson(*ARGUMENTS, board="jetson-r36.4").of("build")) == 1
    assert label_of(device.jetson(*ARGUMENTS, board="jetson-r39.2")) != old


def test_jetson_without_the_groups_gets_none(device):
    (device.bin / "getent").write_text("#!/usr/bin/env bash\nexit 2\n")
    assert "--group-add" not in device.jetson(*ARGUMENTS).command

"""Boards on which run_pi.sh and run_jetson.sh run, and what they did there.

The scripts are real; the board is one of tests/boards (nv_tegra_release lines as published,
/proc/meminfo with the lines that matter), and `docker` is a stand-in that writes down its
arguments. PATH holds that, some more stand-ins, and what every Debian has.
"""

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

BOARDS = ROOT / "tests/boards"
IGPU = "nvcr.io/nvidia/pytorch:25.06-py3-igpu"
SBSA = "nvcr.io/nvidia/pytorch:25.10-py3"
L4T = "nvcr.io/nvidia/l4t-pytorch:r35.2.1-pth2.0-py3"
L4T_OLD = "nvcr.io/nvidia/l4t-pytorch:r32.7.1-pth1.10-py3"
ARGUMENTS = ["--server_address=192.168.1.10:8080", "--cid=0", "--model=Net"]

# What Debian has on every board: bash, coreutils, findutils, mawk.
DEBIAN = [
    "awk", "bash", "cat", "cut", "dirname", "env", "find", "grep", "id", "mkdir", "realpath",
    "sed", "sha256sum", "sort", "stat", "tail", "tr",
]  # fmt: skip

DOCKER = """#!/usr/bin/env bash
# Writes down its arguments and answers as the test demands.
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
  run*"import torch")
    [[ -z ${TORCH_PROBLEM-} ]] || { printf '%s\n' Traceback "$TORCH_PROBLEM" >&2; exit 1; } ;;
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
    """What a launcher printed and which calls of docker it made."""

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
        others = ("--join_only", "import torch")
        (call,) = [call for call in self.of("run") if call[-1] not in others]
        assert call is self.calls[-1]
        return call

    @property
    def trial(self) -> list[str]:
        """The command of the container that only imports torch."""
        (call,) = [call for call in self.of("run") if call[-1] == "import torch"]
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
        """Let `stat` show that this user owns everything."""
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


def label_of(run: Run) -> str:
    return run.base_build[4].partition("=")[2]

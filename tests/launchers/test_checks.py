"""What is refused, or warned of, before anything is built or run."""

import re
import shutil
import socket
import subprocess

import pytest

from tests.launchers.conftest import ARGUMENTS, BOARDS, assert_refused, label_of


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

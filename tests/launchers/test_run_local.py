"""./run_local.sh: all in one, and no process left behind, however it ends."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import LONG, ROOT, Process


def processes(run: Process) -> dict[int, str]:
    """Return the processes of the run's session with their command lines."""
    listing = subprocess.run(
        ["ps", "-ww", "-s", str(run.popen.pid), "-o", "pid=,args="], capture_output=True, text=True
    ).stdout
    return {
        int(line.split()[0]): line.split(maxsplit=1)[1]
        for line in listing.splitlines()
        if "<defunct>" not in line
    }


def pid_of(run: Process, what: str) -> int:
    return next(pid for pid, command in processes(run).items() if what in command)


def assert_nothing_left(run: Process) -> None:
    deadline = time.monotonic() + 5  # the kernel takes a moment to clear up
    while processes(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes(run) == {}


def test_run_shows_lines_of_all_and_ends_with_the_model(launch, tmp_path, monkeypatch):
    (tmp_path / "flower-embedded").mkdir()  # with a key for another server, not to be used here
    (tmp_path / "flower-embedded/device-0.pem").write_text("not to be read")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    run = launch(
        ROOT / "run_local.sh",
        "--data_dir=synthetic:600", "--rounds", "2", "--model", "PiNet",
        "--min-num-clients", "3", "--min_sample_size=3", "--run_dir", "here/run",
        cwd=tmp_path,
    )  # fmt: skip
    assert run.finish() == 0
    for name in ("server  ", "client 0", "client 1", "client 2"):
        assert any(line.startswith(f"{name} | ") for line in run.lines)
    text = run.output
    assert re.search(r"server   \| round 2/2  devices 3/3 .* % \(synthetic images\)", text)
    assert re.search(r"server   \| test accuracy \d+\.\d % on 120 synthetic images", text)
    assert run.lines[-1].startswith("server   | model in here/run/model.safetensors, curves in ")
    assert (tmp_path / "here/run/model.safetensors").exists()
    assert_nothing_left(run)


TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


@pytest.mark.parametrize(
    ("flags", "data"),
    [
        ([], r"50 of 100 images \(part 0 of 2\)"),
        (
            ["--partition=none", "--min_num_clients=1", "--min_sample_size=1"],
            "100 images, all of them",
        ),
    ],
)
def test_folder_of_images_is_split_unless_the_user_decides(
    launch, own_images, tmp_path, flags, data
):
    terminal = [] if flags else [sys.executable, "-c", TERMINAL]
    run = launch(
        *terminal, ROOT / "run_local.sh", f"--data_dir={own_images}", "--rounds=1",
        "--batch_size=10", "--run_dir", tmp_path / "run", *flags,
    )  # fmt: skip
    assert run.finish() == 0, run.output
    assert re.search(f"server   \\| device 0 joined: .*, Net, {data}\n", run.output)
    # Who has a terminal gets a page, too.
    page = re.search(r"server   \| page:  http://127\.0\.0\.1:\d+/\?key=\S+\n", run.output)
    assert bool(page) == bool(terminal)


def test_secure_run_shows_no_token_to_other_users_and_leaves_no_key(launch, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    run = launch(
        ROOT / "run_local.sh",
        "--secure", "--data_dir=synthetic:400", "--rounds=1", "--epochs=40", "--model=PiNet",
        "--run_dir", tmp_path / "run",
    )  # fmt: skip
    run.wait_for(r"client \d \| admitted by 127\.0\.0\.1:\d+ as device \d")
    run.wait_for(r"client \d \| admitted by 127\.0\.0\.1:\d+ as device \d")
    commands = " ".join(processes(run).values())
    assert all(program in commands for program in ("server.py", "--cid 0", "--cid 1"))
    assert "join1_" not in commands
    for pid in processes(run):
        with contextlib.suppress(psutil.NoSuchProcess):  # a sleep of the script
            assert "join1_" not in str(psutil.Process(pid).environ())
    (scratch,) = temporary.iterdir()
    secrets = [scratch / "token", *scratch.rglob("*.pem")]
    assert len(secrets) == 4  # the authority's key and the devices'
    assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}
    assert run.finish() == 0
    assert "round 1/1  devices 2/2" in run.output
    assert list(temporary.iterdir()) == []
    assert_nothing_left(run)


@pytest.mark.timeout(300)
def test_keys_directory_that_is_named_serves_the_next_run_and_a_resumed_one_too(launch, tmp_path):
    for admitted in (1, 0):
        run = launch(
            ROOT / "run_local.sh",
            "--secure", "--keys=keys", "--data_dir=synthetic:200", "--rounds=1", "--model=PiNet",
            "--min_num_clients=1", "--min_sample_size=1", f"--run_dir=run-{admitted}",
            cwd=tmp_path,
        )  # fmt: skip
        assert run.finish() == 0, run.output
        assert "round 1/1  devices 1/1" in run.output
        assert run.output.count("was admitted") == admitted
    (tmp_path / "elsewhere").mkdir()
    run = launch(
        ROOT / "run_local.sh", "--resume=../run-0", "--rounds=2", cwd=tmp_path / "elsewhere"
    )
    assert run.finish(200) == 0, run.output
    assert "round 2/2  devices 1/1" in run.output
    assert "was admitted" not in run.output
    assert "new ones" not in run.output


def test_without_internet_it_reports_so_and_ctrl_c_leaves_nothing(launch, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    run = launch(
        ROOT / "run_local.sh", "--data_dir", tmp_path / "data", "--run_dir", tmp_path / "r"
    )
    run.wait_for(r"cannot download CIFAR-10 from .*; using synthetic images")
    run.wait_for(r"joined: .*25,000 of 50,000 synthetic images \(part \d of 2\)")
    run.wait_for("Training 1 epoch")
    os.killpg(run.popen.pid, signal.SIGINT)
    assert run.finish() == 130
    assert_nothing_left(run)


def test_sigterm_while_fetching_leaves_nothing(launch, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, sends nothing
        for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        run = launch(ROOT / "run_local.sh", "--data_dir", "data", cwd=tmp_path)
        run.wait_for(f"fetching CIFAR-10 into {tmp_path}/data ")
        silent.settimeout(60)
        silent.accept()
        run.signal(signal.SIGTERM)
        assert run.finish() == 143
    assert_nothing_left(run)


@pytest.mark.parametrize(("victim", "clients"), [("server.py", 1), ("client.py", 2)])
def test_death_of_one_ends_all(launch, tmp_path, victim, clients):
    run = launch(
        ROOT / "run_local.sh", "--data_dir=synthetic:400", "--rounds=10000",
        f"--min_num_clients={clients}", "--run_dir", tmp_path / "run",
    )  # fmt: skip
    run.wait_for("round 1/10000")
    os.kill(pid_of(run, victim), signal.SIGKILL)
    assert run.finish() != 0
    assert_nothing_left(run)


def test_wrong_argument_ends_all_with_the_servers_line(launch, tmp_path):
    run = launch(
        ROOT / "run_local.sh", "--data_dir=synthetic:400", "--strategy=FedProx:mu=1",
        "--min_num_clients=1",
    )  # fmt: skip
    assert run.finish() == 1
    assert "server   | server.py: --strategy FedProx:mu=1" in run.output
    assert_nothing_left(run)


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--min_num_clients=two"], "--min_num_clients 'two' is not a whole number above 0"),
        (["--batch-size", "0"], "--batch_size '0' is not a whole number above 0"),
        (["--rounds"], "--rounds '' is not a whole number above 0"),
        (["--model=ResNet"], "no model 'ResNet'; utils.MODELS has Net, PiNet, ResNet18"),
        (["--lr", "-1"], "--lr -1 is not above 0"),
        (["--round", "5"], "there is no flag --round; --rounds?"),
        (["--cid=1"], "--cid is a flag of client.py"),
        (
            ["--strategy=FedOpt"],
            "Flower has no FedOpt any more; use FedAdam, FedYogi or FedAdagrad",
        ),
        (["--resume", "--round", "5"], "there is no flag --round; --rounds?"),
        (
            ["--partition=half"],
            "no partition 'half'; choose auto, iid, none or dirichlet:0.5 "
            "(any number from 1e-6 to 1e6)",
        ),
        (["--resume", "no run"], "no run to resume in '{cwd}/no run': it has no config.json"),
    ],
)
def test_argument_is_checked_before_python_is_set_up(launch, tmp_path, arguments, line):
    names = ["run_local.sh", "requirements.txt", "utils.py"]  # and no .venv
    for name in [*names, *(f"{room}/" for room in ("plumbing", "federated"))]:
        if name.endswith("/"):
            shutil.copytree(ROOT / name, tmp_path / name)
            continue
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    run = launch(tmp_path / "run_local.sh", *arguments, cwd=tmp_path)
    assert run.finish() in (1, 2)
    assert run.lines == ["run_local.sh: " + line.format(cwd=tmp_path)]


def test_sh_runs_it_with_bash(launch, tmp_path):
    run = launch("sh", ROOT / "run_local.sh", "--rounds=none", cwd=tmp_path)
    assert run.finish() == 1
    assert run.lines == ["run_local.sh: --rounds 'none' is not a whole number above 0"]


# Going on


def interrupt(run: Process) -> str:
    """Press Ctrl-C; return the command that the run prints for going on."""
    os.killpg(run.popen.pid, signal.SIGINT)
    assert run.finish() == 130
    assert_nothing_left(run)
    (command,) = re.findall(r"To continue after round \d+: (.*)", run.output)
    return command


def settings(run_dir: Path) -> dict:
    return json.loads((run_dir / "config.json").read_text())


@pytest.mark.timeout(300)
def test_command_that_ctrl_c_prints_finishes_the_run_with_its_model_data_and_clients(
    launch, tmp_path
):
    run = launch(
        ROOT / "run_local.sh", "--model=PiNet", "--data_dir=synthetic:600", "--rounds=8",
        "--epochs=4", "--min_num_clients=1", "--min_sample_size=1", "--run_dir=my run",
        cwd=tmp_path,
    )  # fmt: skip
    run.wait_for("round 2/8 ")  # round 1 is on the disk by then
    command = interrupt(run)
    assert command == f"{ROOT}/run_local.sh --resume 'my run'"
    before = settings(tmp_path / "my run")

    run = launch("bash", "-c", command, cwd=tmp_path)
    assert run.finish(200) == 0, run.output
    assert "round 8/8  devices 1/1" in run.output
    assert (tmp_path / "my run/model.safetensors").exists()
    assert_nothing_left(run)
    after = settings(tmp_path / "my run")
    for name in ("model", "data_dir", "min_num_clients", "num_partitions", "test_images"):
        assert after[name] == before[name]
    assert after["model"] == "PiNet"
    assert after["data_dir"] == "synthetic:600"


@pytest.mark.skipif(not LONG, reason="with LONG=1; others resume runs, also secured ones")
@pytest.mark.timeout(300)
def test_secure_run_goes_on_with_new_keys_when_its_own_are_deleted(launch, tmp_path):
    run = launch(
        ROOT / "run_local.sh", "--secure", "--model=PiNet", "--data_dir=synthetic:400",
        "--rounds=8", "--epochs=4", "--min_num_clients=1", "--min_sample_size=1",
        "--run_dir=run", cwd=tmp_path,
    )  # fmt: skip
    run.wait_for("round 2/8 ")  # round 1 is on the disk by then
    command = interrupt(run)
    run = launch("bash", "-c", command, cwd=tmp_path)
    assert run.finish(200) == 0, run.output
    assert run.output.count("the keys of this run are gone; its clients get new ones") == 1
    assert run.output.count("was admitted") == 1
    assert "round 8/8  devices 1/1" in run.output


def test_run_whose_images_are_gone_goes_on_with_no_others(launch, tmp_path):
    config = {"model": "Net", "data_dir": "/no/such/images", "min_num_clients": 2,
              "server_address": "127.0.0.1:8080"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = launch(ROOT / "run_local.sh", "--resume", tmp_path)
    assert run.finish() == 1
    (line,) = run.lines
    assert line.startswith("run_local.sh: no images in '/no/such/images', where the run has them")


@pytest.mark.parametrize(
    "config, part",
    [("{}", "lacks model, data_dir"), ("[", "cannot read"), ('{"model": 5}', "has model 5")],
)
def test_damaged_settings_are_one_line(launch, tmp_path, config, part):
    (tmp_path / "config.json").write_text(config)
    run = launch(ROOT / "run_local.sh", "--resume", tmp_path)
    assert run.finish() == 1
    (line,) = run.lines
    assert line.startswith("run_local.sh: ")
    assert part in line


def test_nothing_is_fetched_into_a_folder_with_other_things(launch, tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    run = launch(ROOT / "run_local.sh", "--data_dir", tmp_path / "photos")
    assert run.finish() == 1
    assert "needs train/<class>/* and test/<class>/*, and has cat/" in run.output
    assert "fetching CIFAR-10" not in run.output
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat"]

"""./run_local.sh: all in one, and no process left behind, however it ends."""

import os
import re
import signal
import socket
import subprocess
import time

import pytest

from tests.conftest import ROOT, Process


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


def test_run_shows_all_speakers_and_ends_with_the_model(launch, tmp_path, monkeypatch):
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


@pytest.mark.parametrize(
    ("flags", "data"),
    [
        ([], r"50 of 100 images \(part 0 of 2\)"),
        (["--partition=none"], "100 images, all of them"),
    ],
)
def test_folder_of_images_is_split_unless_the_user_decides(
    launch, own_images, tmp_path, flags, data
):
    run = launch(
        ROOT / "run_local.sh", f"--data_dir={own_images}", "--rounds=1", "--batch_size=10",
        "--run_dir", tmp_path / "run", *flags,
    )  # fmt: skip
    assert run.finish() == 0, run.output
    assert re.search(f"server   \\| device 0 joined: .*, Net, {data}\n", run.output)


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
    (scratch,) = temporary.iterdir()
    secrets = [scratch / "token", *scratch.rglob("*.pem")]
    assert len(secrets) == 4  # the authority's key and the devices'
    assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}
    assert run.finish() == 0
    assert "round 1/1  devices 2/2" in run.output
    assert list(temporary.iterdir()) == []
    assert_nothing_left(run)


def test_keys_directory_that_is_named_serves_the_next_run_too(launch, tmp_path):
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


def test_without_internet_it_says_so_and_ctrl_c_leaves_nothing(launch, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    run = launch(
        ROOT / "run_local.sh", "--data_dir", tmp_path / "data", "--run_dir", tmp_path / "r"
    )
    run.wait_for(r"cannot download CIFAR-10 from .*; going on with synthetic images")
    run.wait_for(r"joined: .*25,000 of 50,000 synthetic images \(part \d of 2\)")
    run.wait_for("Training 1 epoch")
    os.killpg(run.popen.pid, signal.SIGINT)
    assert run.finish() == 130
    assert_nothing_left(run)


def test_sigterm_while_fetching_leaves_nothing(launch, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        run = launch(ROOT / "run_local.sh", "--data_dir", "data", cwd=tmp_path)
        run.wait_for("fetching CIFAR-10 into data")
        silent.settimeout(60)
        silent.accept()
        run.signal(signal.SIGTERM)
        assert run.finish() == 143
    assert_nothing_left(run)


@pytest.mark.parametrize("victim", ["server.py", "client.py"])
def test_death_of_one_ends_all(launch, tmp_path, victim):
    run = launch(
        ROOT / "run_local.sh", "--data_dir=synthetic:400", "--rounds=10000",
        "--run_dir", tmp_path / "run",
    )  # fmt: skip
    run.wait_for("round 1/10000")
    os.kill(pid_of(run, victim), signal.SIGKILL)
    assert run.finish() != 0
    assert_nothing_left(run)


def test_wrong_argument_ends_all_with_the_servers_line(launch, tmp_path):
    run = launch(
        ROOT / "run_local.sh", "--data_dir=synthetic:400", "--batch_size=0", "--min_num_clients=1",
        "--min_sample_size=1",
    )  # fmt: skip
    assert run.finish() == 1
    assert "server   | server.py: --batch_size 0 is below 1" in run.output
    assert_nothing_left(run)
    assert launch(ROOT / "run_local.sh", "--min_num_clients=two").finish() == 1

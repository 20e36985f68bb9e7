"""The app on Flower's engine, for real; see `run` beside this file."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.numpy

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.timeout(900)
SETTINGS = {"data_dir": "synthetic:2000", "threads": "1", "seed": "3", "lr": "0.05"}


@pytest.fixture
def engine(launch, tmp_path):
    """Start run_engine.sh's program; Flower's files go to a directory of the test."""
    home = tmp_path / "home"

    def start(*arguments, **options):
        flags = [f"--{name}={value}" for name, value in options.items()]
        command = ["env", f"FLWR_HOME={home}", f"PYTHONPATH={ROOT}", sys.executable]
        return launch(*command, "-m", "plumbing.engine", *flags, *arguments)

    start.home = home
    return start


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir):
    return safetensors.numpy.load_file(run_dir / "model.safetensors")


def left_running(home):
    """Return the processes of a run that is over."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(home) in " ".join(process.cmdline()) + process.environ().get("FLWR_HOME", ""):
                found.append(process.name())
        except psutil.Error:
            continue
    return found


def test_simulation_and_stream_give_the_same_model(engine, start_server, start_client, tmp_path):
    of = {"stream": tmp_path / "stream", "engine": tmp_path / "engine"}
    data, seed, lr = SETTINGS["data_dir"], SETTINGS["seed"], SETTINGS["lr"]

    def on_the_stream(*arguments, **options):
        server, address = start_server(*arguments, data_dir=data, **options)
        for cid in (0, 1):
            start_client(address, cid, data_dir=data, threads="1")
        assert server.finish(240) == 0

    on_the_stream(rounds="1", seed=seed, lr=lr, run_dir=str(of["stream"]))
    simulated = engine(rounds=1, run_dir=of["engine"], **SETTINGS)
    assert simulated.finish(400) == 0, simulated.output
    first, other = weights(of["stream"]), weights(of["engine"])
    assert first.keys() == other.keys()
    for name in first:
        np.testing.assert_allclose(other[name], first[name], rtol=0, atol=1e-6)

    on_the_stream(f"--resume={of['stream']}", rounds="3", run_dir=str(of["stream"]))
    simulated = engine(f"--resume={of['engine']}", rounds=3, threads=1)
    assert simulated.finish(400) == 0, simulated.output
    assert f"resuming {of['engine']} after round 1" in simulated.output
    found = {name: [row["accuracy"] for row in records(path)] for name, path in of.items()}
    assert len(found["engine"]) == 3
    assert found["engine"] == pytest.approx(found["stream"], abs=0.002)
    assert found["engine"][-1] > found["engine"][0]
    files = {name: {file.name.split(".1")[0] for file in of[name].iterdir()} for name in of}
    assert files["engine"] == files["stream"]  # TensorBoard's have the time in their names
    assert not left_running(engine.home)


def test_superlink_of_the_run_ends_with_it(engine, tmp_path):
    run = engine("--superlink", rounds=1, run_dir=tmp_path / "run", **SETTINGS)
    assert run.finish(600) == 0, run.output
    assert len(records(tmp_path / "run")[0]["devices"]) == 2
    time.sleep(1)
    assert not left_running(engine.home)


# --- A deployment: TLS, registered keys, a data base ---


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def kill(process):
    """End a process and all that it started, as a power cut does."""
    for part in [*psutil.Process(process.popen.pid).children(recursive=True), process.popen]:
        part.send_signal(signal.SIGKILL)
    process.finish()


class Deployment:
    """A SuperLink and its SuperNodes as docs/engine.md starts them, all on this machine."""

    def __init__(self, launch, folder):
        self.launch, self.folder, self.keys = launch, folder, folder / "keys"
        self.port, self.home = free_port(), folder / "home"
        self.started = []
        self.home.mkdir()
        subprocess.run(
            [ROOT / "deploy/keys.sh", "127.0.0.1", "kitchen", "garden"], cwd=folder, check=True
        )
        (self.home / "config.toml").write_text(
            f'[superlink.fleet]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.keys}/ca.crt"\n'
        )

    def start(self, program, *arguments):
        bin = Path(sys.executable).parent
        environment = [f"FLWR_HOME={self.home}", f"PATH={bin}:{os.environ['PATH']}"]
        self.started.append(self.launch("env", *environment, bin / program, *arguments))
        return self.started[-1]

    def superlink(self):
        started = self.start(
            "flower-superlink", f"--ssl-ca-certfile={self.keys}/ca.crt",
            f"--ssl-certfile={self.keys}/server.crt", f"--ssl-keyfile={self.keys}/server.key",
            "--host=127.0.0.1", f"--port={self.port}", f"--database={self.folder}/superlink.db",
            "--enable-supernode-auth", "--disable-runtime-dependency-installation",
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return started
            time.sleep(0.1)
        raise AssertionError("the SuperLink does not start")

    def register(self, name):
        done = self.start("flwr", "supernode", "register", self.keys / f"{name}.pub", "fleet")
        assert done.finish(120) == 0, done.output

    def supernode(self, name, part):
        return self.start(
            "flower-supernode", f"--root-certificates={self.keys}/ca.crt",
            f"--superlink=127.0.0.1:{self.port}", "--host=127.0.0.1", f"--port={free_port()}",
            f"--auth-supernode-private-key={self.keys}/{name}",
            f"--node-config=partition-id={part} num-partitions=2",
        )  # fmt: skip

    def run(self, run_dir):
        values = {**SETTINGS, "run_dir": str(run_dir), "partition": "iid"}
        config = " ".join(f"{k}={v}" for k, v in (("rounds", 5), ("seed", 3), ("lr", 0.05)))
        config += "".join(f" {k}='{values[k]}'" for k in ("data_dir", "run_dir", "partition"))
        return self.start("flwr", "run", ROOT, "fleet", "--stream", f"--run-config={config}")


@pytest.fixture
def deployment(launch, tmp_path):
    deployment = Deployment(launch, tmp_path)
    yield deployment
    for process in deployment.started:
        if process.popen.poll() is None:
            kill(process)


@pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")),
    reason="deploy/keys.sh needs openssl and ssh-keygen",
)
def test_supernode_that_is_killed_comes_back_in_the_middle_of_a_run(deployment, tmp_path):
    run_dir = tmp_path / "run"
    superlink = deployment.superlink()
    deployment.register("kitchen")
    deployment.register("garden")
    kill(superlink)
    superlink = deployment.superlink()  # its data base has the keys
    nodes = [deployment.supernode(name, i) for i, name in enumerate(("kitchen", "garden"))]
    stranger = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", stranger])
    shutil.copy(stranger, deployment.keys / "stranger")
    deployment.supernode("stranger", 1)  # it knows the address and no more
    run = deployment.run(run_dir)
    run.wait_for(r"round 1/5  devices 2/2", 400)
    kill(nodes[1])
    for _ in range(18):  # as systemd and Docker do: until its heartbeat is missed it is refused
        again = deployment.supernode("garden", 1)
        with contextlib.suppress(AssertionError):
            again.wait_for("SuperNode ID", 30)
            break
        time.sleep(5)
    else:
        raise AssertionError(again.output)
    assert run.finish(600) == 0, run.output
    rows = records(run_dir)
    for row in rows:  # its work is done after the restart, or is named as lost
        assert len(row["devices"]) + len(row["dropped"]) == 2
    assert len(rows[-1]["devices"]) == 2
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    joined = [event["cid"] for event in events if event["event"] == "joined"]
    assert sorted(joined) == ["0", "1", "1"]  # and no stranger
    assert [event["cid"] for event in events if event["event"] == "left"] == ["1"]
    assert superlink.popen.poll() is None


def test_run_that_cannot_work_ends_with_the_reason_and_no_process(engine, tmp_path):
    run = engine(strategy="nowhere:Mine", run_dir=tmp_path / "run", data_dir="synthetic:400")
    assert run.finish(400) == 1
    assert run.lines[-1] == (
        f"run_engine.sh: --strategy nowhere:Mine: there is no nowhere.py in '{ROOT}'"
    )
    assert "Traceback" not in run.output
    assert not left_running(engine.home)


def test_interrupted_run_leaves_no_process_and_goes_on(engine, tmp_path):
    run_dir = tmp_path / "run"
    run = engine(rounds=50, run_dir=run_dir, **SETTINGS)
    run.wait_for(r"round 2/50 ", 400)
    os.kill(run.popen.pid, signal.SIGINT)
    assert run.finish(60) == 130
    assert not left_running(engine.home)
    done = len(records(run_dir))
    run = engine(f"--resume={run_dir}", rounds=done + 1, threads=1)
    assert run.finish(400) == 0, run.output
    assert len(records(run_dir)) == done + 1

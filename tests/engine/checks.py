"""The app on Flower's engine, for real; see `run` beside this file."""

import json
import os
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


def supernode(home, node):
    """Return the process of a SuperNode."""
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if f"partition-id={node} num-partitions=2" in command and str(home) == (
                process.environ().get("FLWR_HOME")
            ):
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"there is no SuperNode {node}")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_supernode_that_is_killed_comes_back_in_the_middle_of_a_run(engine, tmp_path):
    run_dir = tmp_path / "run"
    run = engine("--superlink", rounds=3, run_dir=run_dir, **SETTINGS)
    run.wait_for(r"round 1/3  devices 2/2", 400)
    killed = supernode(engine.home, 1)
    command, environment = killed.cmdline(), killed.environ()
    for process in [killed, *killed.children(recursive=True)]:
        process.send_signal(signal.SIGKILL)
    command[command.index("--port") + 1] = str(free_port())
    again = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert run.finish(600) == 0, run.output
    finally:
        started = psutil.Process(again.pid).children(recursive=True)
        for process in [again, *started]:
            process.kill()
        again.wait(30)
    rows = records(run_dir)
    for row in rows:  # its work is done after the restart, or is named as lost
        assert len(row["devices"]) + len(row["dropped"]) == 2
    assert len(rows[2]["devices"]) == 2
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    joined = [event["cid"] for event in events if event["event"] == "joined"]
    assert sorted(joined) == ["0", "1", "1"]
    assert [event["cid"] for event in events if event["event"] == "left"] == ["1"]
    time.sleep(1)
    assert not left_running(engine.home)


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

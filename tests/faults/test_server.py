"""Servers that are killed, interrupted, or lose their disk; runs that are resumed, and ended."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import server
import utils
from tests.conftest import LONG, ROOT, Process, complaint, free_port

STOCK_KILLED = "history and model lost; clients exit 1, nobody re-connects"


def rounds_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def round_of_checkpoint(run: Path) -> int:
    with safetensors.safe_open(run / "checkpoint.safetensors", "np") as file:
        return int(file.metadata()["server_round"])


def assert_same_model(run: Path, other: Path) -> None:
    a, b = (safetensors.numpy.load_file(path / "model.safetensors") for path in (run, other))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].tobytes() == b[name].tobytes(), name


# --- SIGKILL --------------------------------------------------------------------------


def run_with_kills(
    launch: Callable[..., Process],
    run: Path,
    start_devices: Callable[[str], None],
    kill_after: list[int],
    **options: str | int,
) -> float:
    """Run to the end, the server killed shortly after each of these rounds; it exits 0.

    Returns:
        The longest that a new server took until it had finished another round.
    """
    address = f"127.0.0.1:{free_port()}"
    flags = [f"--{name}={value}" for name, value in options.items()]
    settings = [*flags, f"--run_dir={run}", "--data_dir=synthetic:400"]
    rng = random.Random(len(kill_after))
    slowest = 0.0
    for kills, victim_round in enumerate([*kill_after, 0]):
        process = launch(
            sys.executable, ROOT / "server.py", f"--server_address={address}", *settings
        )
        if kills == 0:
            start_devices(address)
        started = time.monotonic()
        if victim_round:
            process.wait_for(rf"round {victim_round}/")
            # From the line on the round to its metrics and checkpoint, and into the next.
            time.sleep(rng.uniform(0, 0.03))
            process.signal(signal.SIGKILL)
        else:
            assert process.finish() == 0, process.output
        process.popen.wait()
        slowest = max(slowest, time.monotonic() - started)
        settings = [f"--resume={run}"]
    return slowest


@pytest.mark.timeout(3600 if LONG else 120)
@pytest.mark.parametrize("strategy", ["FedAdam", "FedAvgM"] if LONG else ["FedAdam"])
def test_killed_server_goes_on_and_ends_bit_for_bit_where_an_unbroken_run_does(
    launch, start_device, record_fault, tmp_path, strategy
):
    """The strategy's momentum is part of the result; a round takes some 20 ms."""
    kills = 60 if LONG else 3
    options = {"rounds": 6 * kills + 5, "strategy": strategy}

    def start_devices(address: str) -> None:
        # They stay: a server that is killed after the last round may have dismissed one of
        # them alone; if that one had ended, the resumed server would wait for it.
        start_device(address, 0, "--add=0.001", "--max_pause=0.3", "--stay")
        start_device(address, 1, "--add=0.002", "--max_pause=0.3", "--stay")

    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    last = [options["rounds"]]  # the model itself is not written yet
    after = [6 * i for i in range(1, kills)]
    slowest = run_with_kills(launch, broken, start_devices, [*after, *last], **options)
    run_with_kills(launch, unbroken, start_devices, [], **options)
    assert_same_model(broken, unbroken)
    numbers = list(range(1, options["rounds"] + 1))
    for run in (broken, unbroken):
        assert [metrics["server_round"] for metrics in rounds_of(run)] == numbers
        assert not list(run.glob("*.part")), "a half-written file is left"
    losses = [[metrics["loss"] for metrics in rounds_of(run)] for run in (broken, unbroken)]
    assert losses[0] == losses[1]
    record_fault(
        f"server killed {kills} times, {strategy}",
        "SIGKILL 0 to 30 ms after a round's line, while the checkpoint is written, and after the "
        "last round",
        f"--resume: all {numbers[-1]} rounds once, model bit for bit that of an unbroken run",
        stock=STOCK_KILLED,
    )
    assert slowest < 100


def test_server_killed_after_the_last_round_dismisses_devices_when_it_is_resumed(
    launch, start_server, start_device, tmp_path
):
    process, address = start_server(
        server_address=f"127.0.0.1:{free_port()}", rounds="1", min_num_clients="1",
        min_sample_size="1",
    )  # fmt: skip
    start_device(address, 0)
    assert process.finish() == 0
    model = tmp_path / "run/model.safetensors"
    model.unlink()  # it is written last
    device = start_device(address, 0, "--max_wait_seconds=30")
    device.wait_for("no server at")
    process = launch(sys.executable, ROOT / "server.py", f"--resume={tmp_path / 'run'}")
    process.wait_for("device 0 joined", 30)
    assert process.finish() == 0, process.output
    assert device.finish() == 0, device.output
    assert model.exists()


# --- Signals --------------------------------------------------------------------------


def test_interrupted_server_drops_its_round_and_devices_wait_for_it(
    start_server, start_device, record_fault, tmp_path
):
    run = tmp_path / "run"
    gates = [tmp_path / "0", tmp_path / "1"]
    for gate in gates:
        gate.mkdir()
        (gate / "round-1").touch()
    process, address = start_server(rounds="3")
    devices = [start_device(address, cid, "--gate", gates[cid]) for cid in (0, 1)]
    for server_round, number, code in ((2, signal.SIGINT, 130), (3, signal.SIGTERM, 143)):
        process.wait_for(f"round {server_round - 1}/3")
        devices[0].wait_for(f"fit of round {server_round}")
        (gates[1] / f"round-{server_round}").touch()  # device 1 is done, device 0 is not
        time.sleep(0.5)
        began = time.monotonic()
        process.signal(number)
        assert process.finish() == code
        ended = time.monotonic() - began
        assert ended < 5
        assert "Traceback" not in process.output
        assert process.lines[-1] == (
            f"server.py: interrupted; devices wait. To continue after round {server_round - 1}: "
            f"python server.py --resume {run}"
        )
        assert round_of_checkpoint(run) == server_round - 1
        assert [m["server_round"] for m in rounds_of(run)] == list(range(1, server_round))
        for device in devices:
            assert device.popen.poll() is None
        record_fault(
            f"{'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'} at the server",
            f"{signal.Signals(number).name} in mid-round",
            f"exit {code}, checkpoint of the last round, devices wait; --resume takes what they "
            "have trained meanwhile",
            ended,
            "exit 0, nothing saved; clients exit 1 when their fit ends",
        )
        process, _ = start_server("--resume", str(run), server_address=address)
        (gates[0] / f"round-{server_round}").touch()

    process.wait_for("round 3/3  devices 2/2")
    assert process.finish() == 0
    assert [device.finish() for device in devices] == [0, 0]
    for server_round in (2, 3):
        fits = [device.output.count(f"fit of round {server_round}") for device in devices]
        assert fits == [1, 1]
    after = safetensors.numpy.load_file(run / "model.safetensors")
    for name, value in utils.build_model("Net", 10, seed=0).state_dict().items():
        np.testing.assert_allclose(after[name], value + 3, atol=1e-5)


def test_second_ctrl_c_ends_the_server_at_once(start_server, start_device, record_fault, tmp_path):
    """The first one waits a second for a hung device to take note."""
    process, address = start_server()
    hung = start_device(address, 0)
    process.wait_for("device 0 joined")
    process.wait_for("waiting for 2 devices")
    hung.signal(signal.SIGSTOP)
    process.signal(signal.SIGINT)
    process.wait_for(
        "server.py: interrupted; devices wait. No round was finished: its directory is removed"
    )
    time.sleep(0.1)
    began = time.monotonic()
    process.signal(signal.SIGINT)
    assert process.finish() == 130
    ended = time.monotonic() - began
    assert ended < 0.7
    assert "Traceback" not in process.output
    assert not (tmp_path / "run").exists()
    record_fault(
        "second Ctrl-C",
        "two SIGINT while a hung device does not answer to the first",
        "exit 130 at once",
        ended,
    )


@pytest.mark.parametrize("program", ["server.py", "client.py"])
@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch"])
def test_ctrl_c_while_the_libraries_are_loaded_gives_no_traceback(launch, program, library):
    process = launch(
        *(sys.executable, ROOT / program, "--server_address=127.0.0.1:1"),
        *(["--cid=0"] if program == "client.py" else []),
        from_scratch=True,
    )
    maps = Path(f"/proc/{process.popen.pid}/maps")
    if not maps.exists():
        pytest.skip("this system does not show which libraries a process has loaded")
    deadline = time.monotonic() + 60
    while library not in maps.read_text():
        assert time.monotonic() < deadline, process.output
        time.sleep(0.001)
    process.signal(signal.SIGINT)
    assert process.finish() in (-signal.SIGINT, 130)
    # client.py loads torch once its flags are checked, and then reports that it was interrupted.
    flags_checked = (program, library) == ("client.py", "libtorch")
    assert process.output == ("Client 0: interrupted" if flags_checked else "")


# --- The disk -------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, which takes a checkpoint of Net three times."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a file system of 1 MB takes root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            pass


def test_full_disk_keeps_the_last_good_checkpoint_and_is_tried_again_each_round(
    start_server, start_device, small_disk, record_fault, tmp_path
):
    run = small_disk / "run"
    process, address = start_server(
        rounds="4", min_num_clients="1", min_sample_size="1", run_dir=str(run)
    )
    start_device(address, 0, "--gate", tmp_path)
    (tmp_path / "round-1").touch()
    process.wait_for("round 1/4")
    while round_of_checkpoint(run) != 1:
        time.sleep(0.01)
    fill(small_disk / "ballast")
    for server_round in (2, 3):
        (tmp_path / f"round-{server_round}").touch()
        process.wait_for(
            f"round {server_round}: cannot write to '{run}' .No space left on device.; training"
        )
        assert round_of_checkpoint(run) == 1
    (small_disk / "ballast").unlink()
    (tmp_path / "round-4").touch()
    assert process.finish() == 0
    assert "Traceback" not in process.output
    assert [metrics["server_round"] for metrics in rounds_of(run)] == [1, 2, 3, 4]
    assert round_of_checkpoint(run) == 4
    assert (run / "model.safetensors").exists()
    record_fault(
        "disk full",
        "file system of 1 MB filled after round 1, room made after round 3",
        "reported each round, the last good checkpoint intact, training continues; nothing is "
        "missing at the end",
        stock="writes nothing at all",
    )


def test_run_directory_removed_in_mid_run_is_reported_and_made_again(
    start_server, start_device, record_fault, tmp_path
):
    run = tmp_path / "run"
    process, address = start_server(rounds="3", min_num_clients="1", min_sample_size="1")
    start_device(address, 0, "--gate", tmp_path)
    (tmp_path / "round-1").touch()
    process.wait_for("round 1/3")
    while round_of_checkpoint(run) != 1:
        time.sleep(0.01)
    shutil.rmtree(run)
    (tmp_path / "round-2").touch()
    process.wait_for(f"round 2: run directory '{run}' was removed with all files in it; made it")
    (tmp_path / "round-3").touch()
    assert process.finish() == 0
    assert [metrics["server_round"] for metrics in rounds_of(run)] == [2, 3]
    assert json.loads((run / "config.json").read_text())["rounds"] == 3
    assert (run / "model.safetensors").exists()
    record_fault(
        "run directory removed in mid-run",
        "rm -r after round 1",
        "reported; made again with settings, checkpoint and the rounds from then on",
        stock="writes nothing at all",
    )


# --- One directory, two servers -------------------------------------------------------


def test_second_server_on_a_run_directory_is_refused_in_one_line(
    start_server, start_device, launch, record_fault, tmp_path
):
    run = tmp_path / "run"
    (tmp_path / "round-1").touch()
    first, address = start_server(rounds="2", min_num_clients="1", min_sample_size="1")
    start_device(address, 0, "--gate", tmp_path, "--max_pause=0.2")
    first.wait_for("round 1/2")
    while round_of_checkpoint(run) != 1:
        time.sleep(0.01)
    resume = [sys.executable, ROOT / "server.py", f"--resume={run}"]
    second = launch(*resume, "--server_address=127.0.0.1:0")
    assert second.finish() == 1
    assert second.lines == [
        f"server.py: run directory '{run}' is locked by its server (process {first.popen.pid}); "
        "stop that one first, or choose another --run_dir"
    ]
    first.signal(signal.SIGKILL)
    first.finish()
    (tmp_path / "round-2").touch()
    third = launch(*resume, f"--server_address={address}")
    assert third.finish() == 0, third.output
    assert [metrics["server_round"] for metrics in rounds_of(run)] == [1, 2]
    record_fault(
        "second server on a run directory",
        "--resume of a directory whose server runs",
        "refused in one line; the lock ends with its server, also by SIGKILL",
    )


# --- What --resume repairs, and what it refuses ---------------------------------------


def test_resume_without_a_directory_prints_which_runs_it_does_not_use(
    finished_run, monkeypatch, capsys, tmp_path
):
    runs = tmp_path / "runs"
    runs.mkdir()
    finished_run.rename(runs / "finished")
    aborted = runs / "aborted"
    shutil.copytree(runs / "finished", aborted)
    rewrite(unchanged, server_round="0")(aborted)  # newer
    monkeypatch.setattr(server, "ROOT", tmp_path)
    _, args = server.parse_args(["--resume"])
    assert args.run_dir == str(runs / "finished")
    assert capsys.readouterr().out == f"not resuming '{aborted}': it has no finished round\n"


def test_flipped_bit_in_the_checkpoint_costs_one_round(
    launch, start_server, start_device, record_fault, tmp_path
):
    run, last = tmp_path / "run", tmp_path / "run/checkpoint.safetensors"
    for server_round in (1, 2, 3):
        (tmp_path / f"round-{server_round}").touch()
    one = {"rounds": "4", "min_num_clients": "1", "min_sample_size": "1"}
    process, address = start_server(server_address=f"127.0.0.1:{free_port()}", **one)
    device = start_device(address, 0, "--gate", tmp_path, "--max_pause=0.2")
    device.wait_for("fit of round 4")
    process.signal(signal.SIGINT)
    process.finish()
    data = bytearray(last.read_bytes())
    data[100_000] ^= 1
    last.write_bytes(data)
    (tmp_path / "round-4").touch()
    process = launch(sys.executable, ROOT / "server.py", f"--resume={run}")
    assert process.finish() == 0, process.output
    assert (
        f"weights file '{last}' is damaged (its checksum does not match) (it was of round 3); "
        f"using '{run / 'checkpoint.previous.safetensors'}' of round 2"
    ) in process.lines
    assert [metrics["server_round"] for metrics in rounds_of(run)] == [1, 2, 3, 4]
    assert device.finish() == 0
    after = safetensors.numpy.load_file(run / "model.safetensors")
    for name, value in utils.build_model("Net", 10, seed=0).state_dict().items():
        np.testing.assert_allclose(after[name], value + 4, atol=1e-5)
    record_fault(
        "a bit of the checkpoint flips",
        "one bit of a weight, --resume",
        "its checksum does not match: goes on from the checkpoint before",
    )


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """The directory of a run that was killed after its first round of three."""
    from plumbing.runs import RunDirectory

    flags = ["--data_dir=synthetic:400", "--server_address=127.0.0.1:0"]
    run_settings, args = server.parse_args(flags)
    classes = [f"pattern {i}" for i in range(10)]
    net = utils.build_model("Net", 10, seed=0)
    named = {name: value.numpy() for name, value in net.state_dict().items()}
    config = {**asdict(run_settings), **vars(args), "run_id": "0", "classes": classes}
    run = RunDirectory(tmp_path / "run", config)
    metrics = {"server_round": 1, "loss": 2.3, "accuracy": 0.1, "seconds": 1.0, "devices": []}
    run.save(1, named, {}, metrics)
    run.close()
    return tmp_path / "run"


def edit_config(**changes: object) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(data) and None


def truncate(run: Path) -> None:
    path = run / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def rewrite(
    change: Callable[[dict[str, np.ndarray]], object], **notes: str
) -> Callable[[Path], None]:
    """Change the checkpoint's arrays, or what it notes."""

    def damage(run: Path) -> None:
        path = run / "checkpoint.safetensors"
        named = safetensors.numpy.load_file(path)
        change(named)
        safetensors.numpy.save_file(named, path, {"server_round": "1", **notes})

    return damage


def unchanged(named: dict[str, np.ndarray]) -> None:
    pass


ODD = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no run to resume in '{run}': it has no config.json"),
        (write("config.json", b""), "cannot read '{run}/config.json'"),
        (write("config.json", b"\xff{"), "cannot read '{run}/config.json'"),
        (write("config.json", b"[1]"), "'{run}/config.json' is not the settings of a run"),
        (write("config.json", b"[" * 100_000), "cannot read '{run}/config.json'"),
        (edit_config(rounds="many"), "'{run}/config.json' has rounds 'many'"),
        (edit_config(rounds=None), "'{run}/config.json' has rounds None"),
        (edit_config(rounds=2.5), "'{run}/config.json' has rounds 2.5"),
        (edit_config(lr=[1]), "'{run}/config.json' has lr [1]"),
        (edit_config(run_id=5), "'{run}/config.json' has run_id 5"),
        (edit_config(data_dir=7), "'{run}/config.json' has data_dir 7"),
        (edit_config(model="Nett"), "no model 'Nett'"),
        (edit_config(strategy="FedSGD"), "no strategy 'FedSGD'"),
        (edit_config(epochs=0), "--epochs 0 is below 1"),
        (lambda run: (run / "checkpoint.safetensors").unlink(), "no weights file '{run}/check"),
        (write("checkpoint.safetensors", b""), "is damaged or no safetensors file"),
        (write("checkpoint.safetensors", b"x" * 300_000), "is damaged or no safetensors file"),
        (truncate, "is damaged or no safetensors file"),
        (rewrite(lambda n: n.pop("fc3.bias")), "is of another model than Net: it has 9 arrays"),
        (rewrite(lambda n: n.update({"fc3.bias": ODD})), "fc3.bias is float32 (3,), not float32"),
        (rewrite(lambda n: n["fc3.bias"].fill(np.nan)), "has non-finite values in fc3.bias"),
        (rewrite(unchanged, server_round=""), "does not note a round"),
        (rewrite(unchanged, server_round="-1"), "does not note a round"),
        (rewrite(unchanged, server_round="²"), "does not note a round"),
        (
            rewrite(lambda n: n.update({"strategy/m_t/1": ODD})),
            "holds the state of another strategy than FedAvg",
        ),
        (
            rewrite(lambda n: n.update({"strategy/aggregate_fit/0": ODD})),
            "holds the state of another strategy than FedAvg",
        ),
    ],
)
def test_damaged_or_foreign_run_is_refused_with_the_reason(
    finished_run, record_fault, damage, message
):
    damage(finished_run)
    line = complaint(server.main, f"--resume={finished_run}")
    assert line.startswith("server.py: ")
    assert message.format(run=finished_run) in line
    if damage is truncate:
        record_fault(
            "damaged or foreign checkpoint or config.json",
            "emptied, truncated, of another type, model or strategy",
            "refused in one line with the reason",
        )


def test_state_of_another_model_in_a_checkpoint_is_refused(finished_run):
    edit_config(strategy="FedAvgM")(finished_run)
    rewrite(lambda n: n.update({"strategy/momentum_vector/0": ODD}))(finished_run)
    line = complaint(server.main, f"--resume={finished_run}")
    assert "holds the state of another strategy than FedAvgM" in line


TAILS = {
    "torn": b'{"server_round": 2, "lo',
    "undecodable": b"\xff\xfe\n",
    "endless": b'{"server_round": 1e999}\n' + b"[" * 100_000,
}


@pytest.mark.parametrize("name", TAILS if LONG else ["endless"])
def test_torn_line_of_metrics_is_healed(
    finished_run, start_server, start_device, record_fault, name
):
    with (finished_run / "metrics.jsonl").open("ab") as file:
        file.write(TAILS[name])
    process, address = start_server(
        "--resume", str(finished_run), rounds="2", min_num_clients="1", min_sample_size="1"
    )
    start_device(address, 0)
    assert process.finish() == 0
    assert "Traceback" not in process.output
    assert [metrics["server_round"] for metrics in rounds_of(finished_run)] == [1, 2]
    record_fault(
        "power cut while metrics.jsonl is written",
        f"{name} line at its end, --resume",
        "the line is dropped, each round is there once",
    )


def test_metrics_of_another_shape_cost_one_line_and_no_result(
    start_server, start_device, record_fault, tmp_path
):
    run = tmp_path / "run"
    process, address = start_server(rounds="2", min_num_clients="1", min_sample_size="1")
    start_device(address, 0, "--gate", tmp_path)
    (tmp_path / "round-1").touch()
    process.wait_for("round 1/2")
    while round_of_checkpoint(run) != 1:
        time.sleep(0.01)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"server_round": 1, "devices": 3}\n[[[[]]]]\n')
    (tmp_path / "round-2").touch()
    assert process.finish() == 0
    assert process.lines[-2:] == [
        f"'{run}/metrics.jsonl' line 2: devices is 3 and 1 more; left out as no record of a round",
        f"model in {run}/model.safetensors, curves in {run}/report.png",
    ]
    assert (run / "report.png").exists()
    record_fault(
        "metrics.jsonl edited by hand in mid-run",
        "valid JSON of another shape",
        "one line; all results are written",
    )


# --- The end of a run -----------------------------------------------------------------


def test_devices_end_with_the_run_or_stay_for_the_next(
    start_server, start_client, record_fault, tmp_path
):
    address = f"127.0.0.1:{free_port()}"
    first, _ = start_server(server_address=address, rounds="1")
    leaving = start_client(address, 0)
    staying = start_client(address, 1, "--stay")
    assert first.finish() == 0
    assert leaving.finish() == 0
    assert leaving.lines[-1] == "Client 0: the server is done, shutting down"
    staying.wait_for(f"the run is over, waiting for the next at {address}")

    second, _ = start_server(
        server_address=address,
        rounds="1",
        min_num_clients="1",
        min_sample_size="1",
        num_partitions="2",
        run_dir=str(tmp_path / "second"),
    )
    assert second.finish() == 0
    assert "round 1/1  devices 1/1" in second.output
    staying.wait_for("the run is over, waiting for the next")
    assert staying.popen.poll() is None
    record_fault(
        "the server ends the run",
        "the last round is over",
        "devices exit 0; with --stay they join the next run",
        stock="clients exit 0",
    )


def test_hung_device_holds_up_the_end_of_a_run_for_seconds_only(
    start_server, start_device, record_fault, tmp_path
):
    process, address = start_server(rounds="1")
    start_device(address, 0, "--gate", tmp_path)
    hung = start_device(address, 1)
    hung.wait_for("fit of round 1")
    time.sleep(1)  # until its weights have been fetched
    hung.signal(signal.SIGSTOP)
    (tmp_path / "round-1").touch()
    process.wait_for("round 1/1  devices 2/2")
    began = time.monotonic()
    process.wait_for("test accuracy")  # printed when all connections are closed
    held_up = time.monotonic() - began
    assert held_up < 8
    assert process.finish() == 0
    hung.signal(signal.SIGCONT)
    assert hung.finish() == 0  # the goodbye lay ready for it
    record_fault(
        "hung device at the end of the run",
        "SIGSTOP after its last reply",
        "it is not waited for; exit 0",
        held_up,
        "the server returns 268 s late",
    )

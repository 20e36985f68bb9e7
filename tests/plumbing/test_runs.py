"""plumbing/runs.py and plumbing/checkpoints.py"""

import fcntl
import hashlib
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from federated.errors import FederationError
from plumbing import runs
from plumbing.checkpoints import load_checkpoint, load_fitting
from plumbing.runs import RunDirectory, newest_run, provenance
from tests.conftest import ROOT

WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7)}
CONFIG = {"model": "Net", "classes": ["milk", "tomato"]}


def make_run(path: Path, rounds: int = 0) -> Path:
    """Leave the directory of a run that ended after so many rounds, and return it."""
    run = RunDirectory(path, CONFIG)
    for server_round in range(rounds + 1):
        metrics = {"server_round": server_round} if server_round else None
        run.save(server_round, weights_of(server_round), metrics=metrics)
    run.close()
    return path


def weights_of(server_round: int) -> dict[str, np.ndarray]:
    return {**WEIGHTS, "a": WEIGHTS["a"] + np.float32(server_round)}


def recorded_rounds(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["server_round"] for line in lines]


def no_room(*_: object) -> None:
    raise OSError(28, "No space left on device")


# --- Checkpoints ----------------------------------------------------------------------


def test_checkpoint_round_trip_keeps_order_types_and_notes(tmp_path):
    run = RunDirectory(tmp_path / "run", CONFIG)
    run.save(1, WEIGHTS, metrics={"server_round": 1, "loss": float("nan")})
    path = tmp_path / "run" / "checkpoint.safetensors"
    loaded, _ = load_fitting(path, WEIGHTS, "Net")
    assert list(loaded) == list(WEIGHTS)
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
    with safetensors.safe_open(path, "np") as file:
        notes = file.metadata()
    assert re.fullmatch("[0-9a-f]{64}", notes.pop("content_sha256"))
    assert notes == {
        "server_round": "1", "model": "Net", "classes": '["milk", "tomato"]', "memory": "{}",
    }  # fmt: skip
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == CONFIG
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    when = datetime.fromisoformat(row.pop("time"))
    assert when.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=1)
    assert row == {"server_round": 1, "loss": None}


def test_checkpoint_brings_back_round_weights_and_the_strategys_state(tmp_path):
    state = {"m_t/0": np.arange(6.0).reshape(2, 3)}
    memory = {"strategy": {"round": 7}, "bounds": {"norms": [0.5, 1e300]}}
    RunDirectory(tmp_path / "run", CONFIG).save(7, WEIGHTS, state, memory=memory)
    server_round, weights, restored, remembered = load_checkpoint(tmp_path / "run", WEIGHTS, "Net")
    assert (server_round, remembered) == (7, memory)
    np.testing.assert_array_equal(weights["a"], WEIGHTS["a"])
    assert restored.keys() == state.keys()
    np.testing.assert_array_equal(restored["m_t/0"], state["m_t/0"])


def test_weights_come_in_the_models_order_whatever_the_files(tmp_path):
    safetensors.numpy.save_file(WEIGHTS, tmp_path / "w")
    backwards = dict(reversed(WEIGHTS.items()))
    assert list(load_fitting(tmp_path / "w", backwards, "Net")[0]) == ["n", "a"]


def test_any_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    run = make_run(tmp_path / "run", rounds=1)
    (run / "checkpoint.previous.safetensors").unlink()
    path = run / "checkpoint.safetensors"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(FederationError):
            load_checkpoint(run, WEIGHTS, "Net")
    path.write_bytes(whole)
    assert load_checkpoint(run, WEIGHTS, "Net")[0] == 1


def flip_a_weight(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # the arrays are at the end
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_weight, "is damaged (its checksum does not match) (it was of round 3)"),
        (lambda path: path.write_bytes(b""), "is damaged or no safetensors file"),
        (Path.unlink, "no weights file '{last}' (it was of an unknown round)"),
    ],
)
def test_damaged_checkpoint_is_replaced_by_the_one_before(tmp_path, capsys, damage, reason):
    run = make_run(tmp_path / "run", rounds=3)
    last, previous = run / "checkpoint.safetensors", run / "checkpoint.previous.safetensors"
    damage(last)
    server_round, weights, *_ = load_checkpoint(run, WEIGHTS, "Net")
    assert server_round == 2
    np.testing.assert_array_equal(weights["a"], weights_of(2)["a"])
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert reason.format(last=last) in printed
    assert str(last) in printed
    assert printed.endswith(f"; using '{previous}' of round 2\n")

    resumed = RunDirectory(run, CONFIG, resumed_round=2)
    assert recorded_rounds(run) == [1, 2]
    resumed.save(3, weights_of(3), metrics={"server_round": 3})
    assert recorded_rounds(run) == [1, 2, 3]
    # The damaged file has not become the one before.
    last.unlink()
    assert load_checkpoint(run, WEIGHTS, "Net")[0] == 2


def test_two_damaged_checkpoints_are_refused_in_one_line_that_names_both(tmp_path):
    run = make_run(tmp_path / "run", rounds=2)
    for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        flip_a_weight(run / name)
    with pytest.raises(FederationError) as refused:
        load_checkpoint(run, WEIGHTS, "Net")
    assert "\n" not in str(refused.value)
    assert f"'{run}/checkpoint.safetensors' is damaged" in str(refused.value)
    assert f"'{run}/checkpoint.previous.safetensors' is damaged" in str(refused.value)


def test_damaged_init_weights_are_refused(tmp_path):
    run = RunDirectory(tmp_path / "run", CONFIG)
    run.finish(WEIGHTS)
    flip_a_weight(run.path / "model.safetensors")
    with pytest.raises(FederationError, match="its checksum does not match"):
        load_fitting(run.path / "model.safetensors", WEIGHTS, "Net")


@pytest.mark.parametrize("hard_links", [True, False])
def test_crash_at_any_instant_of_a_save_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch, hard_links
):
    """A crash before each system call that changes a name; a link that exists is left over too."""
    for calls in range(9):
        run = make_run(tmp_path / f"run-{hard_links}-{calls}", rounds=2)
        resumed = RunDirectory(run, CONFIG, resumed_round=2)
        left = [calls]

        class Crash(BaseException):
            pass

        def step(call, left=left, crash=Crash):
            def counted(*args, **kwargs):
                if left[0] == 0:
                    raise crash
                left[0] -= 1
                return call(*args, **kwargs)

            return counted

        with monkeypatch.context() as patch:
            for name in ("replace", "hardlink_to", "unlink"):
                call = getattr(Path, name)
                if name == "hardlink_to" and not hard_links:
                    call = no_room
                patch.setattr(Path, name, step(call))
            try:
                resumed.save(3, weights_of(3), metrics={"server_round": 3})
                crashed = False
            except Crash:
                crashed = True
        resumed.close()
        server_round, weights, *_ = load_checkpoint(run, WEIGHTS, "Net")
        np.testing.assert_array_equal(weights["a"], weights_of(server_round)["a"])
        assert server_round == 3 if not crashed else server_round in (2, 3)
        again = RunDirectory(run, CONFIG, resumed_round=server_round)
        again.save(4, weights_of(4))
        again.save(5, weights_of(5))
        assert load_checkpoint(run, WEIGHTS, "Net")[0] == 5
        (run / "checkpoint.safetensors").unlink()
        assert load_checkpoint(run, WEIGHTS, "Net")[0] == 4
        assert not list(run.glob("*.part"))
    assert not crashed, "the last crash came before the end"


def test_failed_write_leaves_the_last_checkpoint_and_loses_no_metrics(
    tmp_path, monkeypatch, capsys
):
    run = RunDirectory(tmp_path / "run", CONFIG)
    run.save(1, WEIGHTS, metrics={"server_round": 1})
    good = (run.path / "checkpoint.safetensors").read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        run.save(2, WEIGHTS, metrics={"server_round": 2})
    printed = capsys.readouterr().err
    assert "round 2: cannot write to" in printed
    assert "(No space left on device); training continues" in printed
    assert (run.path / "checkpoint.safetensors").read_bytes() == good
    assert recorded_rounds(run.path) == [1]
    assert not list(run.path.glob("*.part"))
    assert run.saved_round == 1

    run.save(3, WEIGHTS, metrics={"server_round": 3})
    assert [metrics["server_round"] for metrics in run.rounds()] == [1, 2, 3]
    run.finish(WEIGHTS)


@pytest.mark.parametrize("damage", [b"", b"no weights", b"\xff" * 100])
def test_file_that_is_no_safetensors_is_refused(tmp_path, damage):
    (tmp_path / "w").write_bytes(damage)
    with pytest.raises(FederationError, match="is damaged or no safetensors file"):
        load_fitting(tmp_path / "w", WEIGHTS, "Net")


def test_truncated_weights_are_refused(tmp_path):
    safetensors.numpy.save_file(WEIGHTS, tmp_path / "w")
    whole = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(whole[:-1])
    with pytest.raises(FederationError, match="is damaged"):
        load_fitting(tmp_path / "w", WEIGHTS, "Net")


def test_directory_instead_of_a_weights_file_is_refused(tmp_path):
    with pytest.raises(FederationError, match="cannot read weights file"):
        load_fitting(tmp_path, WEIGHTS, "Net")


# --- The directory --------------------------------------------------------------------


def test_directory_in_use_is_locked_until_its_process_is_killed(tmp_path):
    run = make_run(tmp_path / "run", rounds=1)
    code = (
        "import sys, time; from pathlib import Path; from plumbing.runs import RunDirectory\n"
        f"run = RunDirectory(Path(sys.argv[1]), {CONFIG!r}, resumed_round=1)\n"
        "print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, run], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(FederationError) as refused:
            RunDirectory(run, CONFIG, resumed_round=1)
        assert str(refused.value) == (
            f"run directory '{run}' is locked by its server (process {holder.pid}); "
            "stop that one first, or choose another --run_dir"
        )
        assert recorded_rounds(run) == [1]
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    RunDirectory(run, CONFIG, resumed_round=1)


def test_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run = RunDirectory(tmp_path / "run", CONFIG)
    assert capsys.readouterr().err == (
        f"cannot lock '{run}' (No locks available); start no second server on it\n"
    )
    run.save(1, WEIGHTS)


def test_server_that_read_an_older_checkpoint_than_it_finds_under_the_lock_is_refused(tmp_path):
    run = make_run(tmp_path / "run", rounds=3)
    with pytest.raises(FederationError, match="went on from round 2 to round 3"):
        RunDirectory(run, CONFIG, resumed_round=2)
    assert recorded_rounds(run) == [1, 2, 3]


def test_runs_that_start_in_the_same_second_get_directories_of_their_own(tmp_path):
    barrier = threading.Barrier(8)
    made: list[RunDirectory] = []

    def start() -> None:
        barrier.wait()
        made.append(RunDirectory(tmp_path / "20250101-120000-Net", CONFIG, take_free_name=True))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    endings = sorted(run.path.name.removeprefix("20250101-120000-Net") for run in made)
    assert endings == ["", "-2", "-3", "-4", "-5", "-6", "-7", "-8"]


def test_directory_of_a_run_without_a_finished_round_is_removed(tmp_path):
    run = RunDirectory(tmp_path / "run", CONFIG)
    run.save(0, WEIGHTS)
    run.log_event("joined", device="device 0")
    assert run.abandon()
    assert not (tmp_path / "run").exists()


def test_directory_that_cannot_be_set_up_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(FederationError, match="No space left on device"):
        RunDirectory(tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()


def test_directory_is_removed_after_ctrl_c_while_it_is_set_up(tmp_path, monkeypatch):
    def ctrl_c(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        RunDirectory(tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kept_for", ["it existed", "a user's file", "a round", "a lost round"])
def test_directory_is_kept_for(tmp_path, monkeypatch, kept_for):
    path = tmp_path / "run"
    if kept_for == "it existed":
        path.mkdir()
    run = RunDirectory(path, CONFIG)
    run.save(0, WEIGHTS)
    if kept_for == "a user's file":
        (path / "notes.txt").write_text("mine")
    if kept_for == "a round":
        run.save(1, WEIGHTS)
    if kept_for == "a lost round":
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_room)
            run.save(1, WEIGHTS)
    assert not run.abandon()
    assert (path / "checkpoint.safetensors").exists()
    assert (path / "notes.txt").exists() == (kept_for == "a user's file")


# --- metrics.jsonl --------------------------------------------------------------------


@pytest.mark.parametrize(
    "torn", [b'{"se', b"\xff\xfe\n", b'{"server_round": 1e999}\n' + b"[" * 9999]
)
def test_resumed_run_forgets_rounds_after_its_checkpoint_and_torn_lines(tmp_path, torn):
    make_run(tmp_path / "run", rounds=1)
    lines = b'{"server_round": 1}\n{"server_round": 2}\n'
    (tmp_path / "run" / "metrics.jsonl").write_bytes(lines + torn)
    run = RunDirectory(tmp_path / "run", CONFIG, resumed_round=1)
    run.save(2, WEIGHTS, metrics={"server_round": 2, "time": "now", "again": True})
    expected = [{"server_round": 1}, {"server_round": 2, "time": "now", "again": True}]
    assert run.rounds() == expected


NEST = "[" * 900 + "]" * 900

OTHER_SHAPES = [
    ("3", "it is not an object"),
    ("[]", "it is not an object"),
    ("null", "it is not an object"),
    ('"text"', "it is not an object"),
    (NEST, "it is not an object"),
    ("[" * 100_000, "it is not JSON"),
    ("{", "it is not JSON"),
    ("\udcff", "it is not JSON"),
    ("{}", "server_round is null"),
    ('{"server_round": true}', "server_round is true"),
    ('{"server_round": "1"}', "server_round is '1'"),
    ('{"server_round": -1}', "server_round is -1"),
    ('{"server_round": 1.5}', "server_round is 1.5"),
    ('{"server_round": 1e999}', "server_round is Infinity"),
    ('{"server_round": 1%s}' % ("0" * 5000), "it is not JSON"),
    ('{"server_round": 1, "accuracy": []}', "accuracy is a list"),
    ('{"server_round": 1, "accuracy": 1%s}' % ("0" * 400), "accuracy is 10000"),
    ('{"server_round": 1, "loss": {}}', "loss is an object"),
    ('{"server_round": 1, "loss": NaN}', "loss is NaN"),
    ('{"server_round": 1, "seconds": "2"}', "seconds is '2'"),
    ('{"server_round": 1, "devices": 3}', "devices is 3"),
    ('{"server_round": 1, "devices": null}', "devices is null"),
    ('{"server_round": 1, "devices": {}}', "devices is an object"),
    ('{"server_round": 1, "devices": [3]}', "devices has 3"),
    (f'{{"server_round": 1, "devices": {NEST}}}', "devices has a list"),
    ('{"server_round": 1, "devices": [{}]}', "the name of a device is null"),
    ('{"server_round": 1, "devices": [{"name": 5}]}', "the name of a device is 5"),
    ('{"server_round": 1, "devices": [{"name": "\\ud800"}]}', r"the name of a device is '\ud800'"),
    ('{"server_round": 1, "devices": [{"name": "d"}]}', "the seconds of a device are null"),
    (
        '{"server_round": 1, "devices": [{"name": "d", "seconds": Infinity}]}',
        "the seconds of a device are Infinity",
    ),
]


@pytest.mark.parametrize(("line", "reason"), OTHER_SHAPES, ids=range(len(OTHER_SHAPES)))
def test_line_of_another_shape_is_left_out_and_reported_in_one_line(tmp_path, capsys, line, reason):
    run = RunDirectory(make_run(tmp_path / "run", rounds=2), CONFIG, resumed_round=2)
    with (run.path / "metrics.jsonl").open("a", errors="surrogateescape") as file:
        file.write(line + "\n")
    assert [row["server_round"] for row in run.rounds()] == [1, 2]
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert len(printed) < 400
    assert f"'{run}/metrics.jsonl' line 3: {reason}" in printed

    run.close()
    RunDirectory(run.path, CONFIG, resumed_round=2)
    assert recorded_rounds(run.path) == [1, 2]


def test_many_lines_of_another_shape_are_reported_in_one_line(tmp_path, capsys):
    run = RunDirectory(make_run(tmp_path / "run", rounds=1), CONFIG, resumed_round=1)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write("3\n" * 1000)
    assert len(run.rounds()) == 1
    assert "line 2: it is not an object and 999 more" in capsys.readouterr().err


def test_resumed_run_keeps_the_text_of_its_lines(tmp_path):
    make_run(tmp_path / "run", rounds=1)
    text = f'{{ "server_round":1,"mine":  {NEST}}}\n'
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    RunDirectory(tmp_path / "run", CONFIG, resumed_round=1)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == text


def test_metrics_that_cannot_be_read_are_reported_in_one_line(tmp_path):
    run = RunDirectory(tmp_path / "run", CONFIG)
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(FederationError, match=r"cannot read '.*metrics.jsonl' \(Is a directory\)"):
        run.rounds()


# --- events.jsonl ---------------------------------------------------------------------


def events_of(run: RunDirectory) -> list[dict]:
    return [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]


def test_event_is_a_line_with_a_time_and_bounded_text(tmp_path):
    run = RunDirectory(tmp_path / "run", CONFIG)
    run.log_event("joined", device="device 0", images=200)
    run.log_event("dropped", device="device 1", reason="é\n" * 5000, norm=float("nan"), who=None)
    first, second = events_of(run)
    assert datetime.fromisoformat(first.pop("time")).utcoffset() == timedelta(0)
    assert first == {"event": "joined", "device": "device 0", "images": 200}
    assert second["reason"] == "é\n" * 150 + "…"
    assert second["norm"] is second["who"] is None


def test_events_of_several_threads_are_whole_lines(tmp_path):
    run = RunDirectory(tmp_path / "run", CONFIG)

    def log(number: int) -> None:
        for i in range(50):
            run.log_event("joined", device=f"device {number}", i=i)

    threads = [threading.Thread(target=log, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(event["device"], event["i"]) for event in events_of(run)]
    assert sorted(found) == [(f"device {n}", i) for n in range(4) for i in range(50)]


def test_events_that_cannot_be_written_are_reported_once_until_they_can(tmp_path, capsys):
    run = RunDirectory(tmp_path / "run", CONFIG)
    (run.path / "events.jsonl").symlink_to("/dev/full")
    for _ in range(5):
        run.log_event("joined", device="device 0")
    assert capsys.readouterr().err == (
        f"cannot write '{run}/events.jsonl' (No space left on device); events are lost\n"
    )
    (run.path / "events.jsonl").unlink()
    run.log_event("left", device="device 0")
    assert [event["event"] for event in events_of(run)] == ["left"]
    assert capsys.readouterr().err == ""


def test_events_stop_at_a_limit(tmp_path, capsys):
    run = RunDirectory(tmp_path / "run", CONFIG)
    path = run.path / "events.jsonl"
    path.touch()
    os.truncate(path, runs.MAX_EVENTS_BYTES + 1)  # sparse
    for _ in range(2):
        run.log_event("joined", device="device 0")
    assert path.stat().st_size == runs.MAX_EVENTS_BYTES + 1
    assert capsys.readouterr().err.count("it has reached 64 MiB") == 1


# --- A full disk at the end -----------------------------------------------------------


def test_model_that_finds_no_room_is_written_beside_the_run(tmp_path):
    run = RunDirectory(tmp_path / "run", CONFIG)
    run.save(1, WEIGHTS)
    (run.path / "model.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(FederationError) as failed:
        run.finish(WEIGHTS)
    place = re.search(r"No space left on device\); the model is in '(.*)'$", str(failed.value))
    assert place
    assert Path(place[1]).parent.parent == tmp_path
    np.testing.assert_array_equal(
        load_fitting(Path(place[1]), WEIGHTS, "Net")[0]["a"], WEIGHTS["a"]
    )


def test_model_that_finds_no_room_there_is_written_to_the_temporary_directory(
    tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(runs.tempfile, "tempdir", str(elsewhere))
    disk = tmp_path / "disk"
    run = RunDirectory(disk / "run", CONFIG)
    (run.path / "model.safetensors.part").symlink_to("/dev/full")
    write = runs.write_whole

    def full_disk(path: Path, data: bytes, **options: Path) -> None:
        if path.is_relative_to(disk):
            no_room()
        write(path, data, **options)

    monkeypatch.setattr(runs, "write_whole", full_disk)
    with pytest.raises(FederationError) as failed:
        run.finish(WEIGHTS)
    (model,) = elsewhere.rglob("model.safetensors")
    assert str(failed.value).endswith(f"; the model is in '{model}'")
    assert [path.name for path in disk.iterdir()] == ["run"]

    monkeypatch.setattr(runs, "write_whole", no_room)
    with pytest.raises(FederationError, match="; the model is not saved"):
        run.finish(WEIGHTS)
    assert [*elsewhere.rglob("model.safetensors")] == [model]


def test_on_a_terminal_the_user_makes_room_and_nothing_is_missing(tmp_path):
    """The last round found no room either: its metrics and checkpoint are written as well."""
    code = (
        "import sys; from pathlib import Path; from plumbing.runs import RunDirectory\n"
        "import numpy as np\n"
        f"run = RunDirectory(Path(sys.argv[1]), {CONFIG!r}); weights = {{'a': np.ones(3)}}\n"
        "(run.path / 'metrics.jsonl').symlink_to('/dev/full')\n"
        "run.save(1, weights, metrics={'server_round': 1}); run.finish(weights); print('written')"
    )
    ours, theirs = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"],
        cwd=ROOT, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        assert "round 1: cannot write to" in program.stdout.readline()
        os.write(ours, b"\n")  # too early: it is asked again
        for _ in range(2):
            line = program.stdout.readline()
            assert "; make room and press Enter to try again, or Ctrl-C to end" in line
            (model,) = tmp_path.glob("run-*/model.safetensors")
            assert f"the model is in '{model}'" in line
        (tmp_path / "run/metrics.jsonl").unlink()
        os.write(ours, b"\n")
        assert program.communicate(timeout=60)[0] == "written\n"
        assert program.returncode == 0
    finally:
        program.kill()
        program.wait()
        os.close(ours)
    assert recorded_rounds(tmp_path / "run") == [1]
    weights = {"a": np.ones(3)}
    assert load_checkpoint(tmp_path / "run", weights, "Net")[0] == 1
    load_fitting(tmp_path / "run/model.safetensors", weights, "Net")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- Which run is resumed -------------------------------------------------------------


def test_newest_run_with_a_finished_round_is_resumed_and_others_are_named(tmp_path, capsys):
    for age, (name, rounds) in enumerate({"aborted": 0, "good": 1, "older": 2}.items()):
        run = make_run(tmp_path / name, rounds=rounds)
        for path in run.glob("checkpoint*"):
            os.utime(path, (1e9 - age, 1e9 - age))
    RunDirectory(tmp_path / "only begun", CONFIG)
    (tmp_path / "no run").mkdir()
    assert newest_run(tmp_path) == tmp_path / "good"
    assert capsys.readouterr().out.splitlines() == [
        f"not resuming '{tmp_path / 'only begun'}': it has no finished round",
        f"not resuming '{tmp_path / 'aborted'}': it has no finished round",
    ]


def test_run_whose_last_checkpoint_is_damaged_is_still_the_newest(tmp_path):
    run = make_run(tmp_path / "run", rounds=2)
    (run / "checkpoint.safetensors").write_bytes(b"")
    assert newest_run(tmp_path) == run


def test_no_run_to_resume_is_one_line(tmp_path):
    make_run(tmp_path / "aborted")
    with pytest.raises(FederationError, match="no run with a finished round in"):
        newest_run(tmp_path)


# --- Where a run came from ------------------------------------------------------------


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "utils.py").write_text("LR = 0.1\n")
    git(tmp_path, "add", "utils.py")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def test_provenance_names_the_commit_and_whether_files_were_changed(repository):
    commit = git(repository, "rev-parse", "HEAD")
    (repository / "untracked").touch()
    expected = hashlib.sha256(b"LR = 0.1\n").hexdigest()
    assert provenance(repository) == {
        "git_commit": commit, "git_changed": False, "utils_sha256": expected,
    }  # fmt: skip
    (repository / "utils.py").write_text("LR = 0.2\n")
    changed = provenance(repository)
    assert changed["git_commit"] == commit
    assert changed["git_changed"] is True
    assert changed["utils_sha256"] == hashlib.sha256(b"LR = 0.2\n").hexdigest()


def test_provenance_is_none_where_there_is_no_git_no_repository_and_no_commit(
    tmp_path, repository, monkeypatch
):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", "/")
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    nothing = {"git_commit": None, "git_changed": None, "utils_sha256": None}
    assert provenance(other) == nothing  # no commit yet
    assert provenance(Path("/nowhere")) == nothing
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(other))
        assert provenance(repository)["git_commit"] is None
        (other / "git").write_text("#!/bin/sh\nexec /bin/sleep 20\n")
        (other / "git").chmod(0o755)
        began = time.monotonic()
        assert provenance(repository)["git_commit"] is None
        assert time.monotonic() - began < 5  # it waits for 1 s

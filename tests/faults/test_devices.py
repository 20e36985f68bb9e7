"""Devices that die, hang, dawdle or fail while they train."""

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import utils


def rounds_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def first_weights() -> dict[str, np.ndarray]:
    net = utils.build_model("Net", 10, seed=0)
    return {name: value.numpy() for name, value in net.state_dict().items()}


def moved_by(path: Path) -> float:
    """Return how far each weight is from the seed's first, which must be the same for all."""
    named = safetensors.numpy.load_file(path)
    distances = [named[name] - value for name, value in first_weights().items()]
    mean = float(np.mean(distances[0], dtype=np.float64))
    for distance in distances:
        np.testing.assert_allclose(distance, mean, atol=1e-5)
    return mean


def test_device_killed_in_mid_epoch_is_missed_at_once_and_used_when_it_is_back(
    start_server, start_client, start_device, record_fault, tmp_path
):
    server, address = start_server(rounds="2", epochs="100000", partition="none")
    start_device(address, "steady", "--gate", tmp_path)
    victim = start_client(address, "victim")
    victim.wait_for("Epoch took")
    victim.signal(signal.SIGKILL)
    killed = time.monotonic()
    server.wait_for("device victim left")
    noticed = time.monotonic() - killed
    assert noticed < 2
    (tmp_path / "round-1").touch()
    server.wait_for("round 1: dropped device victim: the connection broke")
    server.wait_for("round 1/2  devices 1/2")
    record_fault(
        "device killed, power cut",
        "SIGKILL in the middle of an epoch",
        "named; the round goes on with the others",
        noticed,
        "noticed in 0.01 s, but only as '1 failures': no name, no reason",
    )

    server.wait_for(r"waiting for 2 devices at \S+ \(1 connected\)")
    start_device(address, "victim")
    (tmp_path / "round-2").touch()
    server.wait_for("device victim joined")
    joined = time.monotonic()
    server.wait_for("round 2/2  devices 2/2")
    record_fault(
        "fewer devices than --min_num_clients in mid-run",
        "the killed device is switched on again",
        "the server shows how many it waits for, and continues with the device",
        time.monotonic() - joined,
        "silent wait, up to 24 h",
    )
    assert server.finish() == 0
    dropped = [metrics["dropped"] for metrics in rounds_of(tmp_path / "run")]
    assert dropped == [[{"name": "device victim", "reason": "the connection broke"}], []]


def test_late_reply_is_recognised_and_counts_in_no_round(
    start_server, start_device, record_fault, tmp_path
):
    prompt, late = tmp_path / "prompt", tmp_path / "late"
    prompt.mkdir()
    late.mkdir()
    (prompt / "round-1").touch()
    server, address = start_server(rounds="3", min_sample_size="1", round_timeout="4")
    quick = start_device(address, 0, "--add=1", "--gate", prompt)
    slow = start_device(address, 1, "--add=10", "--gate", late)
    slow.wait_for("fit of round 1")
    began = time.monotonic()
    server.wait_for("round 1: dropped device 1: no reply in 4 s", 20)
    noticed = time.monotonic() - began
    server.wait_for("round 1/3  devices 1/2")

    quick.wait_for("fit of round 2")
    (late / "round-1").touch()  # its reply to round 1 comes in the middle of round 2
    server.wait_for("device 1 answered too late, which does not count")
    for server_round in (2, 3):
        (late / f"round-{server_round}").touch()
        (prompt / f"round-{server_round}").touch()
    server.wait_for("round 2/3  devices 1/1")
    server.wait_for("round 3/3  devices 2/2")
    assert server.finish() == 0

    # Device 0 alone adds 1 in rounds 1 and 2; both add 5.5 on average in round 3.
    assert moved_by(tmp_path / "run" / "model.safetensors") == pytest.approx(7.5, abs=1e-5)
    assert slow.output.count("fit of round 1") == 1
    assert "fit of round 2" not in slow.output
    record_fault(
        "device far slower than the rest",
        "--round_timeout 4; a device takes longer",
        "named; its late reply is in no model (weights as by hand); used again in round 3",
        noticed,
        "its late reply is lost and it exits 1: expelled for the run",
    )


@pytest.mark.waits
def test_hung_device_is_hung_up_on_and_used_again_when_it_wakes(
    start_server, start_client, start_device, record_fault, tmp_path
):
    server, address = start_server(
        *("--rounds=2", "--epochs=100000", "--round_seconds=2", "--round_timeout=5"),
        *("--min_sample_size=1", "--partition=none"),
    )
    (tmp_path / "round-1").touch()
    start_device(address, "steady", "--add=0", "--gate", tmp_path)
    sleeper = start_client(address, "sleeper")
    sleeper.wait_for("Epoch took")
    began = time.monotonic()
    sleeper.signal(signal.SIGSTOP)
    server.wait_for("round 1: dropped device sleeper: no reply in 5 s", 20)
    noticed = time.monotonic() - began
    server.wait_for("round 1/2  devices 1/2")
    server.wait_for("device sleeper left", 20)
    assert 7 < time.monotonic() - began < 20  # 10 s from the round's beginning on
    server.wait_for("waiting for 2 devices")  # round 2 does not go on with one alone
    (tmp_path / "round-2").touch()
    sleeper.signal(signal.SIGCONT)
    sleeper.wait_for("left .*the server waited too long.*next try in")
    server.wait_for("device sleeper joined")
    server.wait_for("round 2/2  devices 2/2", 90)
    assert server.finish() == 0
    record_fault(
        "device hangs",
        "SIGSTOP in the middle of an epoch, --round_timeout 5; SIGCONT later",
        "the round closes without it; hung up on after twice the time; back once it wakes",
        noticed,
        "without a time-out the round stalls for 269 s; with one it exits 1 when it wakes",
    )


def test_devices_of_different_speed_report_the_examples_that_they_used(
    start_server, start_client, edited_client, record_fault, tmp_path
):
    server, address = start_server(
        rounds="1", epochs="2", round_seconds="2", partition="none", min_num_clients="2"
    )
    slow = edited_client(
        address,
        "slow",
        "            optimizer.zero_grad()\n",
        "            time.sleep(0.4)\n            optimizer.zero_grad()\n",
    )
    fast = start_client(address, "fast")
    assert server.finish() == 0
    assert (slow.finish(), fast.finish()) == (0, 0)
    devices = {d["name"]: d for d in rounds_of(tmp_path / "run")[0]["devices"]}
    assert "Training 2 epoch(s) w/ 12 batches each" in fast.lines  # all the 400 images
    assert devices["device fast"]["num_examples"] == 384  # 12 batches of 32, twice
    assert devices["device fast"]["metrics"]["steps"] == 24
    steps = devices["device slow"]["metrics"]["steps"]
    assert 1 <= steps <= 6  # after 2 s, with 0.4 s and more a step
    assert devices["device slow"]["num_examples"] == 32 * steps
    assert f"Stopped after {steps} of 24 batches" in slow.lines
    record_fault(
        "devices of different speed",
        "--round_seconds 2; one takes 0.4 s a batch",
        f"slow device stops at 2 s and reports {32 * steps} examples, the fast one its 384",
        stock="no such setting: the round lasts as long as the slowest takes",
    )


FAILING = """    failures.append(1)
    if {failing}:
        {error}
    optimizer = SGD(net.parameters(), settings.momentum, settings.weight_decay)
"""
BUG = "undefined_name.oops()"
NO_MEMORY = "torch.empty(2**46)"  # 281 TB
BROKEN_FILE = "__import__('PIL.Image').Image.open(__file__)"


def test_exception_in_training_is_reported_and_three_in_a_row_leave_a_device_out(
    start_server, start_client, edited_client, record_fault, tmp_path
):
    server, address = start_server(rounds="6", min_num_clients="3", min_sample_size="3")

    def start_failing(cid: int, failing: str, error: str):
        line = "    optimizer = SGD(net.parameters(), settings.momentum, settings.weight_decay)\n"
        code = "    failures = train.__dict__.setdefault('failures', [])\n"
        code += FAILING.format(failing=failing, error=error)
        return edited_client(address, cid, line, code)

    good = start_client(address, 0)
    twice = start_failing(1, "len(failures) in (1, 2, 4)", f"{NO_MEMORY} if len(failures) == 1 "
                          f"else {BROKEN_FILE}")  # fmt: skip
    always = start_failing(2, "True", BUG)
    reasons = {
        1: r"dropped device 1: could not train: RuntimeError\(.*(allocate|memory)",
        2: r"dropped device 1: could not train: UnidentifiedImageError\(.cannot identify image",
    }
    for server_round in (1, 2, 3):
        seen = []
        while not seen or "devices" not in seen[-1]:
            seen.append(server.wait_for(f"round {server_round}.*")[0])
        text = "\n".join(seen)
        assert re.search(
            r"dropped device 2: could not train: NameError\(.name 'undefined_name'", text
        )
        if server_round in reasons:
            assert re.search(reasons[server_round], text)
    assert server.finish() == 0
    assert [client.finish() for client in (good, twice, always)] == [0, 0, 0]

    line = "round 3: device 2 is left out after 3 bad replies in a row, until it reconnects"
    assert line in server.lines
    assert server.output.count("joined: ") == 3  # nobody had to come back
    assert "left\n" not in server.output
    counts = [(len(m["devices"]), m["sampled"]) for m in rounds_of(tmp_path / "run")]
    assert counts == [(1, 3), (1, 3), (2, 3), (1, 2), (2, 2), (2, 2)]
    assert "fit failed, reported to the server: NameError" in always.output
    record_fault(
        "exception in a device's training",
        "out of memory, a broken file, a NameError in utils.py",
        "reported to the server with its message; the device stays and is used in the next round",
    )
    record_fault(
        "a device that fails three times in a row",
        "the NameError in each round",
        "left out, named; the run goes on with the others",
    )


def test_round_without_enough_good_replies_is_tried_again_and_then_the_run_can_be_resumed(
    start_server, start_device, launch, record_fault, tmp_path
):
    (tmp_path / "run").mkdir()  # one that existed before is kept, also without a finished round
    server, address = start_server(rounds="2", min_replies="2", round_retries="1", partition="none")
    good = start_device(address, "good", "--add=1")
    bad = start_device(address, "bad", "--add=nan")
    assert server.finish() == 1
    assert server.lines[-1].startswith("server.py: round 1 brought no new model in 2 attempts")
    assert "round 1: no new model from 1 good replies, attempt 1 of 2" in server.lines
    assert server.output.count("round 1: dropped device bad: conv1.weight has 450 non-finite") == 2
    assert f"To continue after round 0: python server.py --resume {tmp_path}/run" in server.output
    assert "Traceback" not in server.output
    bad.signal(signal.SIGKILL)
    bad.finish()

    # Both attempts started from the same weights, if they had to be computed at all.
    good.wait_for("left .*the server was interrupted.*, next try in")
    starts = {line.split()[-1] for line in good.lines if line.startswith("fit of round 1")}
    assert len(starts) == 1

    server, address = start_server("--resume", f"{tmp_path}/run", server_address=address)
    assert f"resuming {tmp_path}/run after round 0" in server.output
    start_device(address, "bad", "--add=3")
    assert server.finish() == 0
    assert moved_by(tmp_path / "run" / "model.safetensors") == pytest.approx(4, abs=1e-5)
    record_fault(
        "too few valid replies in a round",
        "--min_replies 2 --round_retries 1; one of two devices sends NaN",
        "tried again with the same model, then exit 1 with the reasons; --resume goes on",
        stock="NaN is averaged into the model, exit 0",
    )

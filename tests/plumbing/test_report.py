"""plumbing/report.py"""

import math
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from federated.rounds import Contribution, Device, Joined, Left, Step, Waiting
from plumbing.picture import draw_report
from plumbing.report import Console, device_line
from plumbing.runs import RunDirectory


def test_report_is_a_picture_also_with_devices_that_come_and_go(tmp_path):
    rounds = [
        {
            "server_round": i,
            "accuracy": i / 10,
            "loss": 1 / i,
            "seconds": 4.0,
            "devices": [{"name": f"device {j} $_{{", "seconds": 1.0 + j} for j in range(i)],
        }
        for i in range(1, 4)
    ]
    draw_report(tmp_path / "report.png", "Net, FedAvg", rounds)
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 1000
    draw_report(tmp_path / "one.png", "one round", rounds[:1])


def test_report_shows_what_the_run_began_with(tmp_path):
    rounds = [
        {"server_round": 1, "accuracy": 0.8, "loss": 1.0, "seconds": 1.0, "devices": []},
        {"server_round": 2, "accuracy": 0.9, "loss": 1.0, "seconds": 1.0, "devices": []},
    ]

    def drawn(start: float | None, rounds: list[dict] = rounds) -> bytes:
        draw_report(tmp_path / "report.png", "Net", rounds, start)
        with Image.open(tmp_path / "report.png") as picture:
            return picture.tobytes()

    assert len({drawn(start) for start in (None, 0.1, 0.5)}) == 3
    assert drawn(0.1, rounds[1:]) == drawn(None, rounds[1:])  # round 1 is not known


def test_report_takes_losses_that_are_not_finite_and_odd_titles(tmp_path):
    rounds = [
        {"server_round": i, "accuracy": 0.1, "loss": loss, "seconds": 1.0, "devices": []}
        for i, loss in enumerate((float("nan"), float("inf"), 0.0), 1)
    ]
    draw_report(tmp_path / "report.png", "images in /data/$HOME$_{", rounds)
    assert (tmp_path / "report.png").exists()


@pytest.mark.parametrize("losses", [(1.0, math.nan, 0.5), (math.inf, math.nan)])
def test_loss_that_json_cannot_hold_is_a_gap_in_the_curve(tmp_path, losses):
    run = RunDirectory(tmp_path / "run", {"model": "Net", "classes": ["a", "b"]})
    for i, loss in enumerate(losses, 1):
        metrics = {"server_round": i, "accuracy": 0.1, "loss": loss, "seconds": 1.0, "devices": []}
        run.save(i, {"w": np.zeros(1, np.float32)}, metrics=metrics)
    rounds = run.rounds()
    assert [m["loss"] for m in rounds] == [x if math.isfinite(x) else None for x in losses]

    def drawn(lost: float | None) -> bytes:
        path = tmp_path / "report.png"
        draw_report(path, "Net", [m | {"loss": m["loss"] or lost} for m in rounds])
        with Image.open(path) as picture:
            return picture.tobytes()

    assert drawn(None) == drawn(math.nan) != drawn(0.0)


DEVICE = {
    "name": "device 0",
    "num_examples": 24992,
    "seconds": 38.213,
    "bytes_sent": 248_500,
    "bytes_received": 248_600,
    "metrics": {
        "loss": 1.2,
        "seconds": 37.9,
        "images_per_second": 654.3,
        "peak_ram_mb": 412.0,
        "cpu_temperature": 61.8,
        "throttled": "under-voltage, throttled",
        "throttled_since_boot": "under-voltage, throttled",
    },
}


def test_device_line_shows_what_a_pi_reports():
    assert device_line(DEVICE) == (
        "  device 0     24,992 images    38.2 s     654 images/s    412 MB RAM   62 °C"
        "    0.25 MB down    0.25 MB up  under-voltage, throttled"
    )


def test_device_line_shows_what_a_jetson_reports():
    metrics = {
        "images_per_second": 8123,
        "peak_ram_mb": 1930.5,
        "cpu_temperature": 49.0,
        "gpu_temperature": 48.6,
        "power_watts": 14.27,
    }
    assert device_line({**DEVICE, "name": "device 1", "metrics": metrics}) == (
        "  device 1     24,992 images    38.2 s   8,123 images/s  1,930 MB RAM   49 °C"
        "  GPU  49 °C   14.3 W    0.25 MB down    0.25 MB up"
    )


def test_device_line_has_earlier_throttling_apart():
    metrics = {"throttled": "", "throttled_since_boot": "frequency capped"}
    assert device_line({"name": "device 2", "metrics": metrics}).endswith(
        "  earlier: frequency capped"
    )
    assert device_line({"name": "device 2", "metrics": {"throttled": ""}}).strip() == "device 2"


def test_device_line_stays_a_line_whatever_a_device_calls_its_state():
    line = device_line({"name": "device 2", "metrics": {"throttled": "very " * 200}})
    assert line.endswith("very very ") and len(line) < 80


@pytest.mark.parametrize("metrics", [None, {}, 5, "x", [], {"loss": 1.0}])
def test_device_line_without_telemetry_has_what_the_server_saw(metrics):
    line = device_line({**DEVICE, "metrics": metrics})
    assert " ".join(line.split()) == "device 0 24,992 images 38.2 s 0.25 MB down 0.25 MB up"


METRICS = [*DEVICE["metrics"], "gpu_temperature", "power_watts"]
TEXT = st.text("under-voltage, é", max_size=1000)
ANY = st.one_of(st.none(), st.booleans(), st.integers(-(10**400), 10**400), st.floats(), TEXT)
LINE = re.compile(
    r"  device 0  "
    r"(  +-?[0-9,]+(\.[0-9]+)? (images|s|images/s|MB RAM|°C|W|MB down|MB up)|  GPU +-?[0-9]+ °C)*"
    r"(  (earlier: )?[-, a-zé]{1,60})?"
)


@given(
    st.fixed_dictionaries({}, optional={name: ANY for name in DEVICE if name != "name"}),
    st.fixed_dictionaries({}, optional=dict.fromkeys(METRICS, ANY)),
)
def test_no_word_of_a_device_breaks_its_line(entry, metrics):
    line = device_line({**entry, "name": "device 0", "metrics": metrics})
    assert LINE.fullmatch(line)
    assert len(line) < 300


# --- The console, with many devices ---


def step_of(names):
    contributions = [Contribution(Device(n), 10, 10, 1.0, {}, 1.0, 10, 10) for n in names]
    return Step(1, {}, {"loss": 1.0, "accuracy": 0.5}, len(names), contributions, [], 1.0, 0.1)


def test_many_devices_that_join_at_once_take_few_lines_and_the_missing_are_named(capsys):
    console = Console("here:1", 5, "")
    here = [cid for cid in map(str, range(50)) if cid not in ("3", "17")]
    for count, cid in enumerate(here, 1):
        console(Joined(Device(cid)))
        console(Waiting(50, count, 0, 0))
    deadline = time.monotonic() + 10
    printed = ""
    while "missing: 3, 17)" not in printed and time.monotonic() < deadline:
        time.sleep(0.05)
        printed += capsys.readouterr().out
    lines = printed.splitlines()
    assert len(lines) == 12
    assert lines[1] == (
        "waiting for 50 devices at here:1 (1 connected; missing: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …)"
    )
    assert lines[-2] == "43 devices joined: 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, …"
    assert lines[-1] == "waiting for 50 devices at here:1 (48 connected; missing: 3, 17)"


def test_devices_that_left_at_once_are_summed_up_before_what_follows(capsys):
    console = Console("here:1", 5, "")
    for cid in "abcdefghijkl":
        console(Left(Device(cid)))
    console(Waiting(12, 0, 0, 0))
    console(step_of(["a"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[4:7] == [
        "device e left",
        "7 devices left: f, g, h, i, j, k, l",
        "waiting for 12 devices at here:1 (0 connected)",
    ]
    assert lines[7].startswith("round 1/5  devices 1/1")


def test_devices_of_a_round_are_in_order_and_their_columns_straight(capsys):
    Console("here:1", 5, "")(step_of(["10", "9", "kitchen-window", "2"]))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split("  ")[1].strip() for line in lines] == [
        "device 2", "device 9", "device 10", "device kitchen-window",
    ]  # fmt: skip
    assert len({line.index("images") for line in lines}) == 1


def test_no_missing_numbers_are_guessed_where_devices_have_names(capsys):
    console = Console("here:1", 5, "")
    console(Joined(Device("kitchen")))
    console(Waiting(2, 1, 0, 0))
    assert capsys.readouterr().out.endswith("waiting for 2 devices at here:1 (1 connected)\n")


def test_report_of_5000_devices_in_100_rounds_takes_seconds(tmp_path):
    rng = np.random.default_rng(0)
    seconds = rng.lognormal(3, 0.5, (100, 5000)).tolist()
    classes = {f"class {i}": i / 200 for i in range(200)}
    rounds = [
        {
            "server_round": i,
            "accuracy": 0.5,
            "loss": 1.0,
            "class_accuracy": classes,
            "devices": [{"name": f"device {j}", "seconds": s} for j, s in enumerate(row)],
        }
        for i, row in enumerate(seconds, 1)
    ]
    start = time.process_time()
    draw_report(tmp_path / "report.png", "Net", rounds)
    assert time.process_time() - start < 10

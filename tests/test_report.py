"""plumbing/report.py"""

import math

import numpy as np
import pytest
from PIL import Image

from plumbing.report import draw_report
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

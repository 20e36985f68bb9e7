"""plumbing/report.py"""

from PIL import Image

from plumbing.report import draw_report


def test_report_is_a_picture_also_with_devices_that_come_and_go(tmp_path):
    rounds = [
        {
            "server_round": i,
            "accuracy": i / 10,
            "loss": 1 / i,
            "seconds": 4.0,
            "devices": [{"name": f"device {j}", "seconds": 1.0 + j} for j in range(i)],
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

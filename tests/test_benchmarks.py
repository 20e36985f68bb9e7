"""The short form of each benchmark runs and prints its ratios.

It asserts no times: other load on the machine would decide.
"""

import re
import subprocess
import sys

import pytest

from tests.conftest import LONG, ROOT


def short_form(name: str, *flags: str) -> str:
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--short", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_local_epoch_prints_both_ratios_and_that_losses_agree():
    out = short_form("local_epoch", "--threads", "1")
    for ratio in ("2020/ours", "ours/bare"):
        assert re.search(rf"^{ratio}  min [\d.]+  median [\d.]+  max [\d.]+", out, re.M)
    assert "same mathematics: losses differ by" in out


def test_time_to_accuracy_prints_a_ratio_for_each_model():
    out = short_form("time_to_accuracy", "--threads", "1")
    for model in ("Net", "PiNet"):
        assert re.search(rf"^2020/{model} +min [\d.]+  median [\d.]+  max [\d.]+", out, re.M)


def test_round_overhead_prints_its_ratio():
    out = short_form("round_overhead")
    for ratio in ("ours/stock", "tls/ours"):
        assert re.search(rf"^Net +{ratio} +min [\d.]+  median [\d.]+  max [\d.]+", out, re.M)


@pytest.mark.skipif(not LONG, reason="with LONG=1; tests/faults bound the memory in each run")
def test_server_memory_prints_both_peaks_and_their_ratio():
    out = short_form("server_memory")
    assert re.search(
        r"^ +2 clients  ours +\d+ \(\d+\)  stock +\d+ \(\d+\)  ratio [\d.]+$", out, re.M
    )

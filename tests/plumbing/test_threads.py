"""How many processor threads training and evaluation get."""

import dataclasses

import numpy as np
import pytest
import torch

from federated.settings import RunSettings, Settings
from plumbing.threads import Threads
from torch_trainer import TorchTrainer


@pytest.fixture
def four_cores(monkeypatch):
    """Four cores, for what chooses; torch itself keeps one thread."""
    count = 4

    def set_num_threads(number):
        nonlocal count
        count = number

    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    monkeypatch.setattr(torch, "set_num_threads", set_num_threads)


def trial(rates):
    """Return a trial that reaches `rates` with 1, 2, … threads."""
    return lambda seconds: rates[torch.get_num_threads() - 1]


@pytest.mark.parametrize(
    ("rates", "fastest"),
    [
        ([100, 190, 260, 300], 4),
        ([100, 190, 260, 200], 3),
        ([100, 104, 104, 104], 1),  # for so little no second core is taken
        ([100, 3, 200, 300], 1),  # beside another program: more are not tried
    ],
)
def test_auto_takes_the_fastest_number_of_threads(four_cores, rates, fastest):
    threads = Threads("auto")
    threads.choose(trial(rates))
    assert torch.get_num_threads() == threads.count == fastest


def test_rate_that_halves_lets_auto_choose_again_and_is_reported(four_cores, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    threads = Threads("auto")
    threads.choose(trial([100, 200, 150, 150]))
    beside_another = trial([100, 10, 10, 10])
    assert threads.watch(400, 2.0, beside_another) == ""
    assert threads.watch(220, 2.0, beside_another) == ""  # slower, but not half as fast
    report = threads.watch(40, 2.0, beside_another)
    assert report == (
        "1 processor thread from here on, not 2: the rate fell from 200 to 20 a second "
        "(1: 100, 2: 10). Another run will differ in the last bits"
    )
    assert torch.get_num_threads() == 1


def test_number_that_was_given_stays_whatever_the_rate(four_cores):
    threads = Threads("2")
    assert threads.watch(1, 2.0, trial([9, 1, 1, 1])) == ""
    assert threads.watch(1, 2000.0, trial([9, 1, 1, 1])) == ""
    assert torch.get_num_threads() == 2


def train(notes=None, threads=None, run_id="a"):
    trainer = TorchTrainer("0", "Net", "synthetic:400", "cpu", threads=threads, notes=notes)
    settings = RunSettings(partition="none").for_round(1)
    weights, _, metrics = trainer.fit(
        trainer.get_weights(), dataclasses.replace(settings, run_id=run_id)
    )
    return weights, metrics["threads"]


def test_trials_leave_no_trace_in_the_weights():
    torch.set_num_threads(1)
    tried, _ = train(threads=Threads("auto"))
    given, _ = train(threads=Threads("1"))
    assert all(np.array_equal(tried[name], given[name]) for name in given)


def test_restarted_device_keeps_the_number_of_its_run(tmp_path, monkeypatch, capsys, four_cores):
    def choice(rates, run_id):
        torch.set_num_threads(4)
        monkeypatch.setattr(TorchTrainer, "_try", lambda self, settings, _: trial(rates)(0))
        return train(tmp_path / "threads.json", Threads("auto"), run_id)[1]

    assert choice([1000, 1900, 1000, 1000], "a") == 2
    assert choice([1000, 900, 800, 700], "a") == 2
    assert "2 thread(s), as before in this run" in capsys.readouterr().out
    assert choice([1000, 900, 800, 700], "b") == 1


def test_stock_server_gives_no_run_to_keep_the_number_for(tmp_path, monkeypatch, four_cores):
    monkeypatch.setattr(TorchTrainer, "_try", lambda self, settings, _: trial([1, 9, 1, 1])(0))
    assert Settings.from_config({}, 0.1).run_id == ""
    assert train(tmp_path / "threads.json", Threads("auto"), "")[1] == 2
    monkeypatch.setattr(TorchTrainer, "_try", lambda self, settings, _: trial([9, 9, 1, 1])(0))
    torch.set_num_threads(4)
    assert train(tmp_path / "threads.json", Threads("auto"), "")[1] == 1


def test_device_tries_and_prints_its_number_of_threads(launch, start_server, start_client):
    server, address = start_server("--min_num_clients=1", "--rounds=1", threads="auto")
    device = start_client(address, 0, threads="auto", data_dir="synthetic:400")
    assert server.finish(100) == 0 and device.finish(100) == 0
    assert device.output.count("1 thread(s), the fastest (1: ") == 1

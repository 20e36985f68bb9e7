"""The gate: which new model is handed out, judged by photographs and by devices."""

import errno
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import utils
from federated.settings import RunSettings
from plumbing import publish
from plumbing.publish import Publication
from tests.photos import CLASSES, MODEL
from torch_heads import Publisher, make_card


@pytest.fixture
def judge():
    """Photographs that judge: which of them a model has right is set by the test."""
    return SimpleNamespace(
        hits=right(20), evaluate=lambda net, device: SimpleNamespace(accuracy=0.5)
    )


@pytest.fixture
def publisher(tmp_path, judge):
    net = utils.build_model(MODEL, 3)
    card = make_card(replace(RunSettings(), model=MODEL), net, CLASSES)
    return Publisher(card, net, Publication(tmp_path / "published"), judge)


def head(value: float):
    return {
        "head.weight": np.full((3, 64), value, np.float32),
        "head.bias": np.zeros(3, np.float32),
    }


def right(count: int) -> np.ndarray:
    """Return which of 40 photographs are named rightly: the first `count`."""
    return np.arange(40) < count


def handed_out(publisher):
    card = json.loads((publisher.publication.folder / "card.json").read_bytes())
    from safetensors.numpy import load_file

    value = load_file(publisher.publication.folder / "head.safetensors")["head.weight"][0, 0]
    return card["version"], card["accuracy"], value


def test_model_that_is_worse_at_the_gate_is_not_handed_out(publisher):
    assert publisher.consider(head(1), 0.5, right(20)) == ""
    first = handed_out(publisher)
    assert first[1:] == (0.5, 1)
    assert publisher.consider(head(2), 0.375, right(15)) == (
        "worse at the gate: 0 newly right, 5 newly wrong"
    )
    assert handed_out(publisher) == first


def test_model_that_is_better_or_may_be_as_good_is_handed_out(publisher):
    publisher.consider(head(1), 0.5, right(20))
    assert publisher.consider(head(2), 0.4, right(16)) == ""  # four fewer can be chance
    assert handed_out(publisher)[1:] == (0.4, 2)
    assert publisher.consider(head(3), 0.75, right(30)) == ""
    assert handed_out(publisher)[1:] == (0.75, 3)


def test_model_that_devices_find_worse_is_replaced_by_the_best_one(publisher):
    publisher.consider(head(1), 0.5, right(20))
    publisher.consider(head(2), 0.45, right(18))
    version = publisher.publication.version
    publisher.publication.judge("a", version, (20, 0, 3))
    publisher.publication.judge("b", version, (20, 1, 6))
    assert publisher.consider(head(3), 0.9, right(36)) == (
        "worse on 40 photographs of devices; back to the best model"
    )
    now, accuracy, value = handed_out(publisher)
    assert (accuracy, value) == (0.5, 1)
    assert now > version
    assert publisher.consider(head(4), 0.3, right(12)).startswith("worse at the gate: ")
    assert publisher.consider(head(5), 0.9, right(36)) == ""
    assert handed_out(publisher)[2] == 5


def test_one_device_alone_takes_no_model_back(publisher):
    publisher.consider(head(1), 0.5, right(20))
    publisher.consider(head(2), 0.75, right(30))
    publisher.publication.judge("hostile", publisher.publication.version, (50, 0, 50))
    publisher.publication.judge("honest", publisher.publication.version, (20, 3, 0))
    assert publisher.consider(head(3), 0.8, right(32)) == ""
    assert handed_out(publisher)[2] == 3


def test_restart_hands_out_what_devices_had_and_judges_the_next_model_by_it(publisher, judge):
    judge.hits = right(30)
    publisher.begin(head(1))
    again = Publisher(
        make_card(replace(RunSettings(), model=MODEL), publisher.net, CLASSES),
        publisher.net, Publication(publisher.publication.folder), judge,
    )  # fmt: skip
    again.begin(head(2))  # of the checkpoint: it was worse at the gate
    assert handed_out(again)[2] == 1
    judge.hits = right(20)
    assert again.offer(head(3)) == "worse at the gate: 0 newly right, 10 newly wrong"
    assert handed_out(again)[2] == 1


def test_full_disk_keeps_the_model_that_is_handed_out_and_ends_nothing(publisher, monkeypatch):
    publisher.begin(head(1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(publish, "write_whole", full)
    assert publisher.offer(head(2)) == (
        f"cannot write '{publisher.publication.folder}' (No space left on device)"
    )
    assert handed_out(publisher)[2] == 1
    monkeypatch.undo()
    assert publisher.offer(head(3)) == ""
    assert handed_out(publisher)[2] == 3

"""The same scripted rounds with torch's trainer and the one without, through the same Client."""

from dataclasses import replace

import numpy as np
import pytest

import utils
from client import Client
from federated.settings import RunSettings, Settings
from head_trainer import HeadTrainer
from light_trainer import OnnxBackbone
from tests.fridges import draw
from torch_export import to_onnx
from torch_heads import TorchBackbone, make_card

CLASSES = ["Cabbage", "Milk", "Tomato"]
MODEL = "tests.tiny_model:Tiny"
FRIDGES = {"a": (0, 1), "b": (1, 2)}
ROUNDS = 4


@pytest.fixture
def net():
    return utils.build_model(MODEL, len(CLASSES))


@pytest.fixture
def clients(net, tmp_path):
    """Return a function that makes two fridges' clients with a kind of backbone."""
    card = make_card(replace(RunSettings(), model=MODEL), net, CLASSES)
    (tmp_path / "backbone.onnx").write_bytes(to_onnx(net, 32, features=True))
    for cid, labels in FRIDGES.items():
        for i in range(9):
            label = labels[i % 2]
            draw(tmp_path / cid / "photos" / CLASSES[label] / f"{i}.jpg", label, i)

    def make(kind):
        backbone = (
            TorchBackbone(net) if kind == "torch" else OnnxBackbone(tmp_path / "backbone.onnx")
        )
        trainers = {
            cid: HeadTrainer(
                cid, card, backbone, tmp_path / cid / "photos", tmp_path / cid / kind,
                tmp_path / cid / "exclude.txt",
            )
            for cid in FRIDGES
        }  # fmt: skip
        return [Client(cid, trainer) for cid, trainer in trainers.items()]

    return make


def play(clients, weights, between=lambda server_round: None):
    """Play rounds of federated averaging; return the weights after each, and its losses."""
    history = []
    for server_round in range(1, ROUNDS + 1):
        settings = Settings(
            lr=0.1, lr_end=0.05, epochs=2, batch_size=4, weight_decay=0.01, proximal_mu=0.1,
            seed=3, server_round=server_round,
        )  # fmt: skip
        replies = [client.fit(weights, settings.to_config()) for client in clients]
        total = sum(count for _, count, _ in replies)
        weights = [
            np.sum([count / total * reply[i] for reply, count, _ in replies], 0, np.float32)
            for i in range(len(weights))
        ]
        losses = [client.evaluate(weights, settings.to_config())[0] for client in clients]
        history.append((weights, [*losses, *(metrics["loss"] for *_, metrics in replies)]))
        between(server_round)
    return history


def test_rounds_with_and_without_torch_agree(net, clients):
    start = list(utils.get_weights(net).values())
    torchs, light = play(clients("torch"), start), play(clients("light"), start)
    assert np.abs(torchs[-1][0][0] - start[0]).max() > 0.01
    for (one, losses), (two, others) in zip(torchs, light, strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
        assert losses == pytest.approx(others, abs=1e-4)
    assert sum(torchs[-1][1][:2]) < sum(torchs[0][1][:2])


@pytest.mark.parametrize("kind", ["torch", "light"])
def test_excluded_and_unlabelled_photographs_change_no_bit(net, clients, tmp_path, kind):
    start = list(utils.get_weights(net).values())
    plain = play(clients(kind), start)

    def appear(server_round):
        (tmp_path / "a" / "exclude.txt").write_text("party-*.jpg\nTomato\n")
        broken = tmp_path / "a" / "photos" / "Milk" / f"party-{server_round}.jpg"
        broken.write_bytes(b"no photograph, so that decoding it would show")
        draw(tmp_path / "a" / "photos" / "Tomato" / f"{server_round}.jpg", 2, 77)
        draw(tmp_path / "a" / "inbox" / f"{server_round}.jpg", 1, 78)

    again = play(clients(kind), start, appear)
    for (one, _), (two, _) in zip(plain, again, strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", ["torch", "light"])
def test_photograph_that_comes_between_two_rounds_counts_in_the_next(net, clients, tmp_path, kind):
    first, _ = clients(kind)
    start = list(utils.get_weights(net).values())
    config = Settings(lr=0.1, lr_end=0.1).to_config()
    assert first.fit(start, config)[1] == 9
    draw(tmp_path / "a" / "photos" / "Tomato" / "new.jpg", 2, 79)
    assert first.fit(start, config)[1] == 10

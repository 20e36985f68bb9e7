"""Models of which only the head learns: what travels, what is computed once, the same numbers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from federated.settings import RunSettings, Settings
from head_trainer import HeadTrainer
from light_trainer import OnnxBackbone
from plumbing.photos import Excluded, labelled, set_apart, views
from torch_export import to_onnx
from torch_heads import TorchBackbone, make_card

MODEL = "tests.tiny_model:Tiny"
CLASSES = ["Cabbage", "Milk", "Tomato"]


def draw(path: Path, seed: int) -> Path:
    """Write a photograph."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((64, 48)).save(path, quality=95)
    return path


@pytest.fixture
def net():
    return utils.build_model(MODEL, len(CLASSES))


@pytest.fixture
def card(net):
    return make_card(replace(RunSettings(), model=MODEL), net, CLASSES)


@pytest.fixture
def photos(tmp_path):
    for label, name in enumerate(CLASSES[1:]):
        for i in range(9):
            draw(tmp_path / "photos" / name / f"{i}.jpg", 100 * label + i)
    return tmp_path / "photos"


def trainer(card, backbone, photos, exclude=None):
    return HeadTrainer("0", card, backbone, photos, photos.parent / "cache", exclude)


def test_only_what_learns_travels(net):
    assert list(utils.get_weights(net)) == ["head.weight", "head.bias"]
    before = net.conv.weight.clone()
    weights = {"head.weight": np.ones((3, 64), np.float32), "head.bias": np.ones(3, np.float32)}
    utils.set_weights(net, weights)
    assert torch.equal(net.conv.weight, before)
    assert net.head.bias.tolist() == [1, 1, 1]


def test_a_round_of_the_real_head_is_below_300_kB():
    from fridgecam.model import EffLite0

    assert sum(a.nbytes for a in utils.get_weights(EffLite0(43)).values()) < 300_000


@pytest.mark.parametrize("sampling", ["shuffled", "balanced"])
def test_numpy_trains_the_head_as_torch_does(net, card, photos, tmp_path, sampling):
    (tmp_path / "backbone.onnx").write_bytes(to_onnx(net, 32, features=True))
    settings = Settings(
        lr=0.1, lr_end=0.02, epochs=3, batch_size=7, weight_decay=0.01, proximal_mu=0.1,
        label_smoothing=0.1, sampling=sampling,
    )  # fmt: skip
    backbones = (TorchBackbone(net), OnnxBackbone(tmp_path / "backbone.onnx"))
    start = utils.get_weights(net)
    (torchs, _, one), (light, _, two) = (
        HeadTrainer("0", card, backbone, photos, tmp_path / str(i)).fit(start, settings)
        for i, backbone in enumerate(backbones)
    )
    for name in start:
        assert not np.allclose(torchs[name], start[name], atol=1e-2)
        np.testing.assert_allclose(light[name], torchs[name], atol=1e-4)
    assert one["steps"] == two["steps"] == 3 * 11  # 18 photographs in 4 views
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)


def test_features_are_computed_once_for_each_photograph(net, card, photos):
    backbone, seen = TorchBackbone(net), []
    compute = backbone.features
    backbone.features = lambda pixels: seen.append(len(pixels)) or compute(pixels)
    weights, settings = utils.get_weights(net), Settings(lr=0.1, lr_end=0.1)
    trainer(card, backbone, photos).fit(weights, settings)
    assert seen == [card.views] * 18
    trainer(card, backbone, photos).fit(weights, settings)  # as after a restart
    assert len(seen) == 18
    draw(photos / "Milk" / "new.jpg", 999)
    trainer(card, backbone, photos).fit(weights, settings)
    assert len(seen) == 19
    trainer(replace(card, frozen="0" * 64), backbone, photos).fit(weights, settings)
    assert len(seen) == 38


def test_excluded_photograph_is_never_decoded_and_changes_no_bit(net, card, photos):
    exclude = photos.parent / "exclude.txt"
    exclude.write_text("party-*.jpg\nTomato\n")
    fit = trainer(card, TorchBackbone(net), photos, exclude).fit
    start, settings = utils.get_weights(net), Settings(lr=0.1, lr_end=0.1)
    without, count, _ = fit(start, settings)
    (photos / "Milk" / "party-1.jpg").write_bytes(b"no photograph, so that decoding it would show")
    draw(photos / "Tomato" / "late.jpg", 7)
    draw(photos.parent / "inbox" / "unlabelled.jpg", 8)
    again, same, _ = fit(start, settings)
    assert count == same == 9
    assert all(without[name].tobytes() == again[name].tobytes() for name in without)


def test_photograph_added_between_two_rounds_counts_in_the_next(net, card, photos):
    fridge, settings = trainer(card, TorchBackbone(net), photos), Settings(lr=0.1, lr_end=0.1)
    assert fridge.fit(utils.get_weights(net), settings)[1] == 18
    draw(photos / "Cabbage" / "1.jpg", 999)
    assert fridge.fit(utils.get_weights(net), settings)[1] == 19


def test_unknown_class_is_named_and_skipped_and_a_missing_one_is_empty(net, card, photos, capsys):
    draw(photos / "Cheese" / "1.jpg", 1)
    fridge = trainer(card, TorchBackbone(net), photos)
    assert "folder 'Cheese' is skipped" in capsys.readouterr().out
    assert {photo.label for photo in fridge.scan()} == {1, 2}
    assert fridge.classes == CLASSES


def test_broken_photograph_is_skipped_by_name(net, card, photos, capsys):
    (photos / "Milk" / "0.jpg").write_bytes(b"\xff\xd8 cut off")
    fridge = trainer(card, TorchBackbone(net), photos)
    assert fridge.fit(utils.get_weights(net), Settings(lr=0.1, lr_end=0.1))[1] == 17
    assert "broken photograph skipped" in capsys.readouterr().err


def test_views_depend_on_the_seed_alone(tmp_path):
    path = draw(tmp_path / "a.jpg", 1)
    one, again, other = (views(path, 32, 4, seed) for seed in (b"a", b"a", b"b"))
    assert one.shape == (4, 3, 32, 32)
    assert np.array_equal(one, again)
    assert np.array_equal(one[:2], other[:2])
    assert not np.array_equal(one[2:], other[2:])


def test_cache_keeps_its_size_limit(net, card, photos):
    fridge = trainer(card, TorchBackbone(net), photos)
    fridge.cache.limit_bytes = 5000
    fridge.fit(utils.get_weights(net), Settings(lr=0.1, lr_end=0.1))
    kept = sum(f.stat().st_size for f in fridge.cache.folder.iterdir())
    assert 0 < kept <= 5000


def test_a_fixed_quarter_is_set_apart(photos):
    rest, apart = set_apart(labelled(photos, CLASSES, Excluded()))
    assert (len(rest), len(apart)) == (14, 4)
    assert not {p.path for p in rest} & {p.path for p in apart}
    assert set_apart(labelled(photos, CLASSES)) == (rest, apart)


def test_version_of_the_data_changes_with_the_photographs_and_shows_none(net, card, photos):
    fridge = trainer(card, TorchBackbone(net), photos)
    first = fridge.data_version()
    assert trainer(card, TorchBackbone(net), photos).data_version() == first
    draw(photos / "Milk" / "new.jpg", 999)
    assert fridge.data_version() != first
    (photos / "Milk" / "new.jpg").unlink()
    assert fridge.data_version() == first
    (photos.parent / "cache" / "salt").write_bytes(b"another device with the same photographs")
    assert fridge.data_version() != first

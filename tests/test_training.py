"""Models, batches, local training and evaluation."""

import copy
import dataclasses
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision import transforms

import utils
from federated.errors import FederationError
from federated.settings import Settings
from torch_trainer import TorchTrainer, VariedLoader


@pytest.fixture(scope="module")
def data() -> utils.ImageSet:
    return utils.load_data("synthetic:640", "train")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads on two busy cores wait for each other; these nets are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def silent(line: str) -> None:
    pass


def rate(lr: float = 0.02, lr_end: float | None = None, **others) -> Settings:
    """Return settings with a constant learning rate, or one that falls to `lr_end`."""
    return Settings(lr, lr if lr_end is None else lr_end, **others)


def numbered(count: int, height: int = 4, width: int = 4) -> utils.ImageSet:
    """Images of noise whose label is their index."""
    images = np.random.default_rng(0).integers(0, 256, (count, 3, height, width), np.uint8)
    return utils.ImageSet(torch.from_numpy(images), torch.arange(count), ["a", "b"], "noise")


class Linear(nn.Module):
    """One layer, so that a step can be done by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 4 * 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1))


# --- Models ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", utils.MODELS)
@pytest.mark.parametrize("num_classes", [2, 10])
def test_every_model_gives_a_score_per_class(name, num_classes):
    net = utils.build_model(name, num_classes)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, num_classes)


def test_net_has_62_006_parameters():
    weights = utils.get_weights(utils.build_model("Net"))
    assert sum(w.size for w in weights.values()) == 62_006


def test_net_computes_what_relu_before_pool_computes():
    net, x = utils.Net(), torch.randn(4, 3, 32, 32)
    y = F.max_pool2d(F.relu(net.conv1(x)), 2)
    y = F.max_pool2d(F.relu(net.conv2(y)), 2).flatten(1)
    y = net.fc3(F.relu(net.fc2(F.relu(net.fc1(y)))))
    assert torch.equal(net(x), y)


def test_resnet18_has_62_arrays_and_no_running_statistics():
    net = utils.build_model("ResNet18")
    weights = utils.get_weights(net)
    assert len(weights) == 62
    assert 11.1e6 < sum(w.size for w in weights.values()) < 11.3e6
    assert not list(net.buffers())


def test_resnet18_computes_what_torchvisions_does_and_names_its_arrays_alike():
    theirs = torchvision.models.resnet18(norm_layer=lambda channels: nn.GroupNorm(32, channels))
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool, theirs.fc = nn.Identity(), nn.Linear(512, 10)
    ours, x = utils.build_model("ResNet18"), torch.randn(2, 3, 32, 32)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), theirs(x))


def in_new_process(code: str, *arguments: str | Path, **environment: str) -> None:
    """Run what depends on which modules are imported already."""
    subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        cwd=Path(utils.__file__).parent,
        env=os.environ | environment,
    )


def test_models_training_and_cifar10_import_neither_torchvision_nor_the_compiler(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    in_new_process(
        """
import contextlib, sys, utils
from federated.errors import FederationError
from federated.settings import Settings

data = utils.load_data("synthetic:64", "train")
for name in utils.MODELS:
    utils.build_model(name)
utils.train(utils.build_model("Net"), utils.TrainLoader(data, 32), Settings(0.02, 0.02))
with contextlib.suppress(FederationError):
    utils.load_data(sys.argv[1], "test")
with contextlib.suppress(FederationError):  # no Internet
    utils.load_data(sys.argv[1] + "/nowhere", "test", download=True)
assert not [name for name in sys.modules if name.startswith(("torchvision", "torch._dynamo"))]
""",
        tmp_path,
        https_proxy="http://127.0.0.1:1",
    )


def test_same_seed_gives_the_same_model_and_leaves_torch_random_alone():
    state = torch.get_rng_state()
    first, again, other = (utils.get_weights(utils.build_model("Net", seed=s)) for s in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["conv1.weight"], other["conv1.weight"])
    assert torch.equal(state, torch.get_rng_state())


def test_unknown_model_is_refused_with_the_list_of_models():
    with pytest.raises(FederationError, match=r"no model 'Resnet18'; utils\.MODELS has Net"):
        utils.build_model("Resnet18")


# --- Weights --------------------------------------------------------------------------


@pytest.mark.parametrize("name", utils.MODELS)
def test_weights_survive_the_round_trip_bit_for_bit(name):
    weights = utils.get_weights(utils.build_model(name, seed=1))
    net = utils.build_model(name, seed=2)
    assert list(weights) == list(net.state_dict())
    utils.set_weights(net, dict(reversed(weights.items())))
    after = utils.get_weights(net)
    assert all(np.array_equal(weights[name], after[name]) for name in weights)


def test_weights_are_copies_on_both_sides():
    net = utils.build_model("Net")
    weights = utils.get_weights(net)
    before = weights["conv1.weight"].copy()
    utils.set_weights(net, weights)
    with torch.no_grad():
        net.conv1.weight.zero_()
    assert np.array_equal(weights["conv1.weight"], before)


def test_read_only_weights_are_taken_without_a_warning(recwarn):
    weights = utils.get_weights(utils.build_model("Net"))
    for array in weights.values():
        array.flags.writeable = False
    utils.set_weights(utils.build_model("Net"), weights)
    assert not recwarn.list


def test_weights_with_other_names_are_refused():
    weights = utils.get_weights(utils.build_model("Net"))
    with pytest.raises(
        FederationError, match=r"10 arrays for a model that has 8; conv3\.bias is in"
    ):
        utils.set_weights(utils.build_model("PiNet"), weights)


def test_wrong_shape_is_refused_by_name():
    weights = utils.get_weights(utils.build_model("Net", num_classes=5))
    with pytest.raises(FederationError, match=r"fc3.weight has shape \(10, 84\), not \(5, 84\)"):
        utils.set_weights(utils.build_model("Net"), weights)


# --- Batches --------------------------------------------------------------------------


def test_normalise_equals_torchvisions_totensor_and_normalize():
    images = numbered(5, 6, 8).images
    by_image = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(utils.MEAN, utils.STD)]
    )
    expected = torch.stack(
        [by_image(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
    )
    torch.testing.assert_close(utils.normalise(images), expected, rtol=0, atol=1e-5)


def test_last_partial_batch_is_dropped():
    loader = utils.TrainLoader(numbered(70), 32)
    assert len(loader) == 2
    assert [len(labels) for _, labels in loader] == [32, 32]


def test_an_epoch_shows_each_image_at_most_once_and_the_next_in_another_order():
    loader = utils.TrainLoader(numbered(70), 32)
    first, second = (torch.cat([labels for _, labels in loader]).tolist() for _ in range(2))
    assert len(set(first)) == len(first) == 64
    assert first != second


def test_epoch_longer_than_a_block_is_complete():
    count = 1000  # of 3 KB: three blocks
    loader = utils.TrainLoader(numbered(count, 32, 32), 20)
    assert sorted(torch.cat([labels for _, labels in loader]).tolist()) == list(range(count))


def test_same_seed_gives_the_same_batches(data):
    one, again, other = (next(iter(utils.TrainLoader(data, 32, seed))) for seed in (5, 5, 6))
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[1], other[1])


def test_an_image_stays_as_it_is_or_is_mirrored():
    data = numbered(200)
    plain = utils.normalise(data.images)
    mirrored = 0
    for images, labels in utils.TrainLoader(data, 50):
        for image, label in zip(images, labels, strict=True):
            flipped = torch.equal(image, plain[label].flip(2))
            assert flipped or torch.equal(image, plain[label])
            mirrored += flipped
    assert 70 < mirrored < 130


def test_without_flip_no_image_is_mirrored():
    data = numbered(200)
    plain = utils.normalise(data.images)
    for images, labels in utils.TrainLoader(data, 50, flip=False):
        assert torch.equal(images, plain[labels])


def test_loader_leaves_the_data_as_they_are(data):
    before = data.images.clone()
    for _ in utils.TrainLoader(data, 32):
        pass
    assert torch.equal(data.images, before)


def test_fewer_images_than_a_batch_train_in_one_smaller_batch():
    ((images, labels),) = utils.TrainLoader(numbered(29), 32)
    assert len(images) == len(labels) == 29
    assert len(utils.TrainLoader(numbered(70), 32)) == 2


def test_partial_batch_is_kept_where_that_is_asked_for_but_not_one_image():
    loader = VariedLoader(numbered(70, 32, 32), 32, balanced=True)
    assert [len(labels) for _, labels in loader] == [32, 32, 6] and len(loader) == 3
    assert len(VariedLoader(numbered(65), 32, balanced=True)) == 2
    trained = utils.train(utils.build_model("Net", 70), loader, rate(), log=silent)
    assert (trained.steps, trained.num_examples) == (3, 70)


def test_balanced_epoch_shows_each_class_as_often():
    data = dataclasses.replace(numbered(400), labels=torch.tensor([0] * 380 + [1] * 20))
    labels = torch.cat([labels for _, labels in VariedLoader(data, 20, balanced=True)])
    assert len(labels) == 400
    assert 150 < int(labels.sum()) < 250


def test_crop_shows_parts_in_other_colours_the_same_for_the_same_seed():
    data = utils._synthetic("synthetic:200", "train", 32, None)
    first, again, other = (
        next(iter(VariedLoader(data, 32, seed, crop=True)))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and first.shape == (32, 3, 32, 32)
    assert not torch.equal(first, other)
    plain = next(iter(utils.TrainLoader(data, 32, 1)))[0]
    assert not any(torch.equal(a, b) for a, b in zip(first, plain, strict=True))
    low, high = utils.normalise(
        torch.tensor([0, 255], dtype=torch.uint8).repeat(3, 1)[None, :, None]
    )[0, :, 0].T
    assert (first >= low.view(3, 1, 1) - 1e-4).all() and (first <= high.view(3, 1, 1) + 1e-4).all()


def test_device_trains_on_small_data_with_crops_balance_and_all_its_images():
    trainer = TorchTrainer("0", "Net", "synthetic:70", "cpu")
    weights, settings = trainer.get_weights(), rate()
    plain = trainer.fit(weights, settings)
    small = dataclasses.replace(settings, augment="crop", sampling="balanced", label_smoothing=0.1)
    changed = trainer.fit(weights, small)
    assert (plain[1], plain[2]["steps"]) == (64, 2)
    assert (changed[1], changed[2]["steps"]) == (70, 3)
    assert not np.array_equal(plain[0]["fc3.weight"], changed[0]["fc3.weight"])


# --- Training -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in utils.MODELS if name != "ResNet18"])
def test_loss_falls(name, data):
    net = utils.build_model(name)
    before = utils.test(net, data).loss
    utils.train(net, utils.TrainLoader(data, 32), rate(epochs=8), log=silent)
    assert utils.test(net, data).loss < 0.8 * before


def test_training_with_the_same_seed_repeats_bit_for_bit(data):
    runs = []
    for _ in range(2):
        net = utils.build_model("Net")
        loader = utils.TrainLoader(data, 32, seed=3)
        loss = utils.train(net, loader, rate(lr_end=0.0), log=silent).loss
        runs.append((loss, utils.get_weights(net)))
    (loss, weights), (loss_again, weights_again) = runs
    assert loss == loss_again
    assert all(np.array_equal(weights[name], weights_again[name]) for name in weights)


@pytest.fixture
def rates(monkeypatch) -> list[float]:
    """The learning rate of every step that is taken."""
    seen: list[float] = []
    step = utils.SGD.step

    def recording_step(self, lr):
        seen.append(lr)
        return step(self, lr)

    monkeypatch.setattr(utils.SGD, "step", recording_step)
    return seen


def test_learning_rate_falls_linearly_over_all_epochs(rates, data):
    loader = utils.TrainLoader(data, 160)
    utils.train(utils.build_model("Net"), loader, Settings(0.08, 0.04, epochs=2), log=silent)
    assert rates == pytest.approx([0.08, 0.075, 0.07, 0.065, 0.06, 0.055, 0.05, 0.045])


def test_learning_rate_follows_the_hook_where_that_is_ahead(rates, data):
    counted = iter([None, 0.1, 0.75, 0.5, 0.0])
    loader = utils.TrainLoader(data, 128)
    settings = Settings(1e-3, 0.0)
    utils.train(
        utils.build_model("Net"), loader, settings,
        before_step=lambda progress: next(counted), log=silent,
    )  # fmt: skip
    assert rates == pytest.approx([1e-3, 0.8e-3, 0.25e-3, 0.4e-3, 0.2e-3])


def test_hook_sees_each_step_and_its_loss(data):
    seen = []
    loader = utils.TrainLoader(data, 160)
    trained = utils.train(
        utils.build_model("Net"), loader, rate(epochs=2), before_step=seen.append, log=silent
    )
    assert [(p.step, p.steps, p.epoch) for p in seen] == [(i, 8, i // 4) for i in range(8)]
    assert all(earlier.seconds < later.seconds for earlier, later in itertools.pairwise(seen))
    losses = [float(p.loss) for p in seen[5:]]
    assert (4 * trained.loss - sum(losses)) == pytest.approx(losses[-1], rel=0.2)


@pytest.mark.parametrize(
    ("stop_at", "steps", "images"), [(0, 1, 160), (3, 3, 480), (4, 4, 640), (6, 6, 640)]
)
def test_hook_ends_the_training_after_one_step_at_least(data, stop_at, steps, images):
    lines = []
    trained = utils.train(
        utils.build_model("Net"), utils.TrainLoader(data, 160), rate(epochs=2, lr=1e-6),
        before_step=lambda progress: 1.0 if progress.step >= stop_at else None, log=lines.append,
    )  # fmt: skip
    assert (trained.steps, trained.num_examples) == (steps, images)
    assert lines[-1] == f"Stopped after {steps} of 8 batches"
    assert trained.loss == pytest.approx(np.log(10), abs=0.1)  # a mean, however many steps


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_takes_the_steps_of_torchs_nesterov_sgd(data, decay):
    nets = [utils.build_model("Net") for _ in range(2)]
    ours = utils.SGD(nets[0].parameters(), 0.9, decay)
    theirs = torch.optim.SGD(
        nets[1].parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=decay
    )
    for (images, labels), lr in zip(utils.TrainLoader(data, 32), (0.05, 0.03, 0.01), strict=False):
        theirs.param_groups[0]["lr"] = lr
        for net, optimizer in zip(nets, (ours, theirs), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
        ours.step(lr)
        theirs.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_sgd_moves_parameters_of_two_kinds_and_leaves_frozen_ones():
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2)])
    net[2].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    optimizer = utils.SGD(net.parameters(), momentum=0.0)
    optimizer.zero_grad()
    (net[0](torch.ones(2)).sum() + net[1](torch.ones(2).double()).sum()).backward()
    optimizer.step(1.0)
    for i, moved in enumerate((1, 1, 0)):
        assert net[i].bias.dtype == (torch.float64 if i == 1 else torch.float32)
        torch.testing.assert_close(net[i].bias.detach(), before[f"{i}.bias"] - moved)


def by_hand(net: nn.Module, batches, lr: float, mu: float) -> nn.Module:
    """Plain SGD on cross-entropy + mu/2 * ||w - w_global||^2, by autograd."""
    net = copy.deepcopy(net)
    anchors = [p.detach().clone() for p in net.parameters()]
    for images, labels in batches:
        distance = sum(((p - w) ** 2).sum() for p, w in zip(net.parameters(), anchors, strict=True))
        loss = F.cross_entropy(net(images), labels) + mu / 2 * distance
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, gradient in zip(net.parameters(), gradients, strict=True):
                p -= lr * gradient
    return net


@pytest.mark.parametrize("mu", [0.0, 2.0])
def test_fedprox_steps_match_the_formula(mu):
    data = dataclasses.replace(numbered(64), labels=torch.arange(64) % 2)
    net = Linear()
    expected = by_hand(net, utils.TrainLoader(data, 16), lr=0.05, mu=mu)
    loader = utils.TrainLoader(data, 16)
    settings = Settings(0.05, 0.05, momentum=0.0, proximal_mu=mu)
    utils.train(net, loader, settings, log=silent)
    for p, e in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, e)


def test_fedprox_keeps_weights_nearer_to_the_global_ones(data):
    start = utils.build_model("Net")

    def moved(mu: float) -> float:
        net = copy.deepcopy(start)
        utils.train(net, utils.TrainLoader(data, 32), rate(proximal_mu=mu), log=silent)
        pairs = zip(net.parameters(), start.parameters(), strict=True)
        return sum(float(((p - w).detach() ** 2).sum()) for p, w in pairs) ** 0.5

    assert moved(1.0) < 0.9 * moved(0.0)


def test_frozen_weights_stay_also_with_fedprox(data):
    net = utils.build_model("Net")
    net.conv1.requires_grad_(False)
    before = net.conv1.weight.clone()
    utils.train(net, utils.TrainLoader(data, 32), rate(proximal_mu=0.1), log=silent)
    assert torch.equal(net.conv1.weight, before)


def test_training_prints_its_two_lines_and_returns_the_mean_loss(data, capsys):
    loader = utils.TrainLoader(data, 32)
    loss = utils.train(utils.build_model("Net"), loader, rate(lr=0.0)).loss
    first, second = capsys.readouterr().out.splitlines()
    assert first == "Training 1 epoch(s) w/ 20 batches each"
    assert re.fullmatch(r"Epoch took: \d+\.\d\d seconds", second)
    assert loss == pytest.approx(np.log(10), abs=0.1)


def test_ctrl_c_ends_an_epoch_in_the_middle(data):
    loader = utils.TrainLoader(data, 32)
    net = utils.build_model("Net")
    seen = []

    def press(_net, _inputs):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt

    net.register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt):
        utils.train(net, loader, rate(), log=silent)
    assert len(seen) == 5


# --- Evaluation -----------------------------------------------------------------------


class Fixed(nn.Module):
    """Predicts class 0 for dark images and class 1 for bright ones, with odds of e to 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = (x.mean((1, 2, 3)) > 0).float()
        return torch.stack([1 - bright, bright, torch.zeros(len(x))], 1)


def test_evaluation_matches_a_count_by_hand():
    images = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    images[3:] = 255  # three dark ones, two bright ones
    data = utils.ImageSet(images, torch.tensor([0, 0, 1, 1, 0]), ["a", "b", "c"], "by hand")
    result = utils.test(Fixed(), data, batch_size=2)
    right, wrong = np.log(np.e + 2) - 1, np.log(np.e + 2)
    assert result.accuracy == pytest.approx(3 / 5)
    assert result.loss == pytest.approx((3 * right + 2 * wrong) / 5)
    assert result.class_accuracy[:2] == pytest.approx([2 / 3, 1 / 2])
    assert result.class_loss[:2] == pytest.approx([(2 * right + wrong) / 3, (right + wrong) / 2])
    assert np.isnan(result.class_accuracy[2])
    assert np.isnan(result.class_loss[2])


def test_evaluation_leaves_the_weights_alone_and_ignores_the_batch_size(data):
    net = utils.build_model("Net")
    before = utils.get_weights(net)
    one, other = utils.test(net, data, batch_size=640), utils.test(net, data, batch_size=100)
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert one.accuracy == other.accuracy
    after = utils.get_weights(net)
    assert all(np.array_equal(before[name], after[name]) for name in before)

"""Where a run begins: a file, another number of classes, torchvision's published weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision

import utils
from federated.errors import FederationError
from federated.settings import RunSettings
from plumbing.checkpoints import encode_weights
from plumbing.runs import RunDirectory
from tests.photos import CLASSES, MODEL, paint
from torch_server import Task


@pytest.fixture
def service(tmp_path):
    for label, name in enumerate(CLASSES):
        paint(tmp_path / "service" / "test" / name / "0.jpg", label, 0)
    return tmp_path / "service"


def open_task(model: str, data_dir) -> Task:
    return Task(replace(RunSettings(), model=model), data_dir)


def test_of_another_number_of_classes_all_but_the_head_is_taken(service, tmp_path, capsys):
    other = utils.build_model(MODEL, 5, seed=9)
    file = tmp_path / "five.safetensors"
    file.write_bytes(encode_weights({n: v.numpy() for n, v in other.state_dict().items()}, {}))
    task = open_task(MODEL, service)
    head = task.net.head.weight.clone()
    with pytest.raises(FederationError, match=r"head.weight is float32 \(5, 64\), not"):
        task.load(str(file))
    task.load(str(file), new_head=True)
    assert torch.equal(task.net.conv.weight, other.conv.weight)
    assert torch.equal(task.net.head.weight, head)
    out = capsys.readouterr().out
    assert "do not fit and are left out: head.bias, head.weight" in out
    assert "these start at random: head.weight, head.bias" in out


def test_file_of_which_nothing_fits_is_refused_with_new_head_too(service, tmp_path):
    file = tmp_path / "other.safetensors"
    file.write_bytes(encode_weights({"w": np.zeros(3, np.float32)}, {}))
    with pytest.raises(FederationError, match="is of another model than"):
        open_task(MODEL, service).load(str(file), new_head=True)


def test_best_checkpoint_of_a_run_starts_another(tmp_path):
    weights = utils.get_weights(utils.build_model("Net", seed=5))
    run = RunDirectory(tmp_path / "run", {"model": "Net", "classes": []})
    row = {"server_round": 1, "accuracy": 0.1, "loss": 1.0, "seconds": 1.0, "devices": []}
    state = {"momentum_vector/0": np.ones(3, np.float32)}
    run.save(1, weights, state, {**row, "validation_accuracy": 0.2})
    run.keep_best()
    task = open_task("Net", "synthetic:100")
    task.load(str(run.path / "checkpoint.best.safetensors"))
    found = utils.get_weights(task.net)
    assert all(np.array_equal(found[name], weights[name]) for name in weights)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A file where torch keeps what it has downloaded; there is no Internet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    file = tmp_path / "torch" / "hub" / "checkpoints" / url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.manual_seed(3)
    net = torchvision.models.squeezenet1_1()
    torch.save(net.state_dict(), file)
    return net, file


def test_torchvisions_weights_are_taken_by_name_but_for_the_classes(published, capsys):
    task = open_task("tests.tiny_model:Squeeze", "synthetic:100")
    task.load("torchvision:squeezenet1_1", new_head=True)
    published_first = published[0].features[0].weight
    assert torch.equal(task.net.features[0].weight, published_first)
    assert "these start at random: classifier.1.weight, classifier.1.bias" in (
        capsys.readouterr().out
    )


def test_published_file_that_would_run_code_is_refused(published):
    torch.save({"w": print}, published[1])
    with pytest.raises(FederationError, match="cannot get https://"):
        open_task("tests.tiny_model:Squeeze", "synthetic:100").load("torchvision:squeezenet1_1")


def test_model_that_torchvision_does_not_have_is_named():
    with pytest.raises(FederationError, match="torchvision has no model 'resnet19'"):
        open_task("Net", "synthetic:100").load("torchvision:resnet19")

"""What Flower is given of this project, without starting its engine."""

import io
import tomllib
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.cli.build import build_fab_from_disk

import utils
from federated.errors import FederationError
from federated.settings import EngineSettings, RunSettings
from plumbing.run_config import read_config
from torch_trainer import load_decoded

ROOT = Path(__file__).resolve().parent.parent


def test_run_config_has_the_names_types_and_defaults_of_the_settings():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    expected = asdict(RunSettings()) | asdict(EngineSettings())
    assert list(config.items()) == list(expected.items())
    assert [type(value) for value in config.values()] == [type(v) for v in expected.values()]


def test_bundle_holds_what_the_app_imports_and_nothing_else():
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))) as bundle:
        names = {name for name in bundle.namelist() if not name.startswith(".info/")}
    folders = ("federated", "plumbing", "plumbing/page", "plumbing/stream", "plumbing/security")
    assert names == {
        "pyproject.toml", "flower_app.py", "client.py", "head_trainer.py", "light_trainer.py",
        "resnet.py", "torch_export.py", "torch_heads.py", "torch_server.py", "torch_trainer.py",
        "utils.py",
        *(f"{f}/{path.name}" for f in folders for path in (ROOT / f).glob("*.py")),
    }  # fmt: skip


def defaults(**changed):
    return {**asdict(RunSettings()), **asdict(EngineSettings()), **changed}


def test_config_with_hyphens_is_understood():
    settings, _ = read_config({"min-num-clients": 5, "lr": 1})
    assert (settings.min_num_clients, settings.lr) == (5, 1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rounds": "three"}, "the run config's rounds is 'three', not of type int"),
        ({"threads": 1.5}, "the run config's threads is 1.5, not of type int"),
        ({"lr": 0.0}, "--lr 0 is not above 0"),
        ({"partition": "odd"}, "no partition 'odd'"),
        ({"data_dir": "data"}, "data_dir 'data' is not absolute"),
        ({"run_dir": "runs/1"}, "run_dir 'runs/1' is not absolute"),
        ({"resume": "/nowhere"}, "no run to resume in '/nowhere'"),
    ],
)
def test_wrong_run_config_is_reported_in_one_line(changed, message):
    with pytest.raises(FederationError) as caught:
        read_config(defaults(**changed))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resumed_run_keeps_its_settings_but_for_those_that_are_given(tmp_path):
    (tmp_path / "config.json").write_text('{"rounds": 5, "epochs": 2, "run_id": "abc"}')
    config = defaults(resume=str(tmp_path), rounds=9)
    settings, args = read_config(config)
    assert (settings.rounds, settings.epochs, args.run_id) == (9, 2, "abc")
    assert args.run_dir == args.resume == str(tmp_path)
    settings, _ = read_config(config | {"epochs": 1, "override": "epochs,lr"})
    assert settings.epochs == 1


def test_decoded_images_are_the_same_and_are_read_once(own_images, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    plain = utils.load_data(own_images, "train")
    first = load_decoded(cache, own_images, "train", 32)
    monkeypatch.setattr(utils, "load_data", lambda *_, **__: pytest.fail("decoded again"))
    again = load_decoded(cache, own_images, "train", 32)
    for found in (first, again):
        assert torch.equal(found.images, plain.images)
        assert torch.equal(found.labels, plain.labels)
        assert (found.classes, found.source) == (plain.classes, plain.source)
        assert found.images.stride() == plain.images.stride()
    part = again.subset(np.array([3, 5]))
    assert torch.equal(part.images, plain.images[[3, 5]])


def test_changed_folder_is_decoded_again(own_images, tmp_path):
    cache = tmp_path / "cache"
    count = len(load_decoded(cache, own_images, "train", 32))
    (own_images / "train/cat/0.png").unlink()
    assert len(load_decoded(cache, own_images, "train", 32)) == count - 1

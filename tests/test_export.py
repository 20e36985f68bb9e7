"""A model as an ONNX file gives what torch gives, and its int8 form nearly that."""

import importlib.util

import numpy as np
import pytest
import torch

import utils
from plumbing.photos import labelled
from tests.photos import CLASSES, MODEL, paint
from torch_export import export, export_at_end


def test_exported_model_gives_the_classes_of_torch(tmp_path):
    net = utils.build_model("PiNet", 3, seed=1)
    rng = np.random.default_rng(0)
    tests, others = (rng.integers(0, 256, (n, 3, 32, 32), np.uint8) for n in (60, 40))
    with torch.inference_mode():
        images = utils.normalise(torch.from_numpy(tests), net)
        labels = net.eval()(images).argmax(1).numpy()
    exact, small = export(net, 32, tmp_path, others, tests, labels)
    assert (exact.same, exact.accuracy, exact.torch_accuracy) == (60, 1.0, 1.0)
    assert small.accuracy >= 0.9
    assert small.file.stat().st_size < exact.file.stat().st_size / 2
    assert "model.int8.onnx: 0.1 MB" in str(small)


def test_without_onnx_the_end_of_a_run_names_what_is_missing(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("torch_export.find_spec", lambda name: name != "onnx" and find(name))
    line = export_at_end(utils.build_model(MODEL, 3), 32, tmp_path, [], [])
    assert line.startswith("no model.onnx: onnx is not installed; later: python server.py export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damaged", [False, True])
def test_without_photographs_to_calibrate_there_is_no_int8_file(tmp_path, damaged):
    for label, name in enumerate(CLASSES):
        paint(tmp_path / "test" / name / "0.jpg", label, 0)
    if damaged:
        (tmp_path / "test" / "Milk" / "0.jpg").write_bytes(b"no photograph")
    net = utils.build_model(MODEL, 3)
    line = export_at_end(net, 32, tmp_path, [], labelled(tmp_path / "test", CLASSES))
    assert ("no model.onnx: cannot identify" if damaged else "3 of 3 test images") in line
    assert (tmp_path / "model.onnx").exists() is not damaged
    assert not (tmp_path / "model.int8.onnx").exists()

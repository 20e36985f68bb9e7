"""A model as an ONNX file gives what torch gives, and its int8 form nearly that."""

import numpy as np
import torch

import utils
from torch_export import export


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

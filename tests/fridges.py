"""A fridge's folder with a tiny model, made without torch: it sees the mean colour."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from PIL import Image
from safetensors.numpy import save_file

from fridgecam.home import Home

SIDE = 32


def backbone() -> bytes:
    """Return an ONNX file: pixels (N, 3, H, W) in, the mean of each channel (N, 3) out."""
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", 3, SIDE, SIDE])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3])
    nodes = [
        helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["numbers"], ["features"], axes=[2, 3], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "tiny", [pixels], [features])
    opset = [helper.make_opsetid("", 17)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()


def make_home(folder: Path, classes: Sequence[str]) -> Home:
    """Make a fridge with a model; the first three classes are red, green and blue."""
    home, count = Home(folder), len(classes)
    home.make()
    head = {"head.weight": np.eye(count, 3, dtype=np.float32), "head.bias": np.zeros(count)}
    head["head.bias"] = head["head.bias"].astype(np.float32)
    card = {"model": "Tiny", "classes": list(classes), "image_size": SIDE, "views": 1}
    shapes = {name: list(array.shape) for name, array in head.items()}
    more = {"frozen": "00", "head": shapes, "version": 1, "files": {}}
    (home.model / "card.json").write_text(json.dumps({**card, **more}))
    (home.model / "backbone.onnx").write_bytes(backbone())
    save_file(head, home.model / "head.safetensors")
    return home


def draw(path: Path, channel: int, seed: int = 0) -> Path:
    """Write a photograph of a colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 90, (48, 64, 3), np.uint8)
    pixels[..., channel] += 150
    Image.fromarray(pixels).save(path)
    return path

"""A trained model as an ONNX file, for devices without torch.

python server.py export runs/<run>
"""

import io
import warnings
from typing import Any

import torch

import utils

OPSET = 17  # onnxruntime 1.14 and newer


class _Pixels(torch.nn.Module):
    """A model that takes pixels as they are in a photograph, 0 to 255."""

    def __init__(self, net: torch.nn.Module, features: bool) -> None:
        super().__init__()
        self.net, self.features = net, features
        self.mean, self.std = (
            torch.tensor(getattr(net, name, default)).view(1, 3, 1, 1)
            for name, default in (("mean", utils.MEAN), ("std", utils.STD))
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        images = (pixels.float() / 255 - self.mean) / self.std
        net: Any = self.net
        return net.features(images) if self.features else net(images)


def to_onnx(net: torch.nn.Module, image_size: int, features: bool = False) -> bytes:
    """Return an ONNX file: uint8 `pixels` (N, 3, H, W) in, float32 `scores` or `features` out."""
    pixels = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    output = "features" if features else "scores"
    file: Any = io.BytesIO()
    with warnings.catch_warnings():
        # The newer exporter needs onnxscript, 20 s, and imports half of torch for the same file.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Pixels(net, features).cpu().eval(),
            (pixels,),
            file,
            input_names=["pixels"],
            output_names=[output],
            dynamic_axes={"pixels": {0: "n"}, output: {0: "n"}},
            opset_version=OPSET,
            dynamo=False,
        )
    return file.getvalue()

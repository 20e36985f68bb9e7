"""FridgeCam's commands: python -m fridgecam COMMAND --help

start      on the server: make the model that fridges begin with
install    on a fridge: join a server and fetch its model
look       name what is in photographs
label      a page to label photographs with, by keys
share      on or off: train with the others
watch      look at new pictures, train when asked, fetch better models
train      train when the server asks; watch does this
model      show the model that is here, or go back to the one before
story      all of it on one machine, with ten fridges
"""

import importlib
import os
import sys

from plumbing import cli

DEVICE = {
    **{name: f"fridgecam.device:{name}" for name in ("install", "share", "train", "model")},
    "look": "fridgecam.look:look",
    "watch": "fridgecam.watch:watch",
    "label": "fridgecam.label:label",
}
COMMANDS = {"start": "fridgecam.start:start", "story": "fridgecam.story:story", **DEVICE}
NEEDED = ("numpy", "onnxruntime", "grpc", "google.protobuf", "safetensors", "PIL")  # no torch


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        sys.exit(f"fridgecam: no command '{name}'; there are {', '.join(COMMANDS)}")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two that spin are slower than one
    cli.start(f"fridgecam {name}", NEEDED if name in DEVICE else cli.NEEDED)
    module, _, function = COMMANDS[name].partition(":")
    getattr(importlib.import_module(module), function)(sys.argv[2:])


if __name__ == "__main__":
    main()

"""Import all that a fridge's commands need, so that what is missing fails the build of the image.

Python compiles what it imports: a command that starts later, as another user, need not.
"""

import compileall
import importlib
import importlib.util
import io
import sys

import uvicorn
from PIL import Image

for name in ("client", "fridgecam.device", "fridgecam.label", "fridgecam.look", "fridgecam.watch"):
    importlib.import_module(name)
for name in ("safetensors.numpy", "plumbing.stream.device"):
    importlib.import_module(name)

uvicorn.Config(print).load()
for kind in ("JPEG", "PNG", "BMP", "WEBP"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    Image.open(file).load()
assert "torch" not in sys.modules
# Not imported: where QEMU builds the image for Arm, ONNX Runtime takes /proc/cpuinfo of the x86
# machine for its own, and crashes.
runtime = importlib.util.find_spec("onnxruntime")
for folder in (".", *runtime.submodule_search_locations):
    assert compileall.compile_dir(folder, quiet=1)
print("the fridge's commands have all that they need")

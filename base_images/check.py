"""Import what client.py imports, and train one step: fails the build of a base that cannot.

Importing also leaves a .pyc file beside each module, which the client may not write: it is
not root.
"""

import importlib.util
import sys

import cryptography.x509
import google.protobuf
import google.protobuf.internal.builder
import grpc
import numpy as np
import PIL.Image
import PIL.ImageOps

try:
    import torch
except (ImportError, OSError, ValueError) as error:
    sys.exit(
        f"torch does not load ({error}); on x86-64 take PyTorch's CPU wheels, with "
        "--build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
    )
if importlib.util.find_spec("torchvision"):  # for users' own models; ours need none
    import torchvision.models  # noqa: F401

PIL.Image.init()  # imports the readers of all formats

net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 5), torch.nn.Flatten(), torch.nn.Linear(4704, 10))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
images = torch.from_numpy(np.random.rand(4, 3, 32, 32).astype(np.float32))
torch.nn.functional.cross_entropy(net(images), torch.zeros(4, dtype=torch.int64)).backward()
optimizer.step()
if not all(parameter.isfinite().all() for parameter in net.parameters()):
    sys.exit("a training step leaves weights that are not finite")
print(
    f"torch {torch.__version__}, NumPy {np.__version__}, "
    f"grpcio {grpc.__version__}, protobuf {google.protobuf.__version__}, "
    f"cryptography {cryptography.__version__}"
)

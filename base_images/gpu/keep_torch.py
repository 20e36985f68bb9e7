"""Keep NVIDIA's torch: while this image is built, and from pip in images built on it.

    python3 keep_torch.py record     before anything is installed
    python3 keep_torch.py verify     afterwards; fails if torch is another one
    python3 keep_torch.py list       which file names what to install

`record` writes constraints.txt, for pip, and torch.json beside this file. An old base image
has an old Python, which has to read this file, if only to report that it is too old.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from runpy import run_path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / ("requirements.txt" if sys.version_info >= (3, 11) else "python3.8.txt")
KEPT = ("torch", "torchvision", "numpy")


def main(step):
    if step == "list":
        print(REQUIREMENTS)
        return
    if sys.version_info < (3, 8):  # noqa: UP036
        sys.exit(
            f"this base image has Python {sys.version_info[0]}.{sys.version_info[1]}, the client "
            "needs 3.8 or newer; choose a newer base image with --build-arg BASE=..."
        )
    found = look()
    print(f"torch {found['version']} (CUDA {found['cuda']}) in {found['folder']}", flush=True)
    if step == "record":
        before = {**found, "missing library": load()}
        (HERE / "torch.json").write_text(json.dumps(before))
        (HERE / "constraints.txt").write_text("\n".join(constraints(found["packages"])) + "\n")
        return
    before = json.loads((HERE / "torch.json").read_text())
    missing = before.pop("missing library")
    if found != before:
        sys.exit(f"torch was replaced: the base image has {before}, this one {found}")
    if load() != missing:
        sys.exit("torch and torchvision load no longer")
    if missing:
        print(f"torch is kept; not loaded, because {missing} is on the board alone")
    else:
        run_path(str(HERE / "check.py"))
        print("torch is kept; torchvision loads with it")


def look():
    """Return what torch is, by its files."""
    from importlib.metadata import version  # Python 3.8
    from importlib.util import find_spec

    folder = find_spec("torch").submodule_search_locations[0]
    torch = run_path(str(Path(folder, "version.py")))
    return {
        "folder": folder,
        "version": torch["__version__"],
        "cuda": torch["cuda"],
        "packages": {name: version(name) for name in KEPT},
    }


def load():
    """Import torch and torchvision; return None, or which of the board's libraries is missing.

    NVIDIA's container runtime mounts the driver (libcuda.so.1, …) when a container is run,
    and while an image is built only if it is Docker's default runtime.
    """
    command = [sys.executable, "-c", "import torch, torchvision"]
    run = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if run.returncode == 0:
        return None
    library = re.search(r"(lib(cuda|nv)\S*): cannot open shared object file", run.stderr)
    if library:
        return library[1]
    sys.exit(f"torch and torchvision do not load in this image:\n{run.stderr}")


def constraints(packages):
    """Return pip's constraints: `packages` as they are, and what the base image sets.

    But for what we install: NVIDIA's file pins every package of its image, among them a
    protobuf that is too old for the stream's messages.
    """
    ours = {package(line) for line in REQUIREMENTS.read_text().splitlines()}
    theirs = [
        line
        for path in os.environ.get("PIP_CONSTRAINT", "").split()
        for line in Path(path).read_text().splitlines()
    ]
    return [f"{name}=={number}" for name, number in packages.items()] + [
        line for line in theirs if package(line) not in {*ours, *packages}
    ]


def package(line):
    """Return the name of the package that a line of a requirements file is about."""
    name = re.match(r"[\w.-]*", line.strip())[0]
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main(sys.argv[1])

"""Keep NVIDIA's torch: while this image is built, and from pip in images built on it.

    python3 keep_torch.py record          before anything is installed
    python3 keep_torch.py install FOLDER  what client.py needs beside torch
    python3 keep_torch.py verify          afterwards; fails if torch is another one

`record` writes constraints.txt, for pip, and torch.json beside this file. An old base image
has an old Python, which has to read this file, if only to report that it is too old.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

HERE = Path(__file__).resolve().parent
VERSION = sys.version_info[:2]
PIP = "21.3.1"  # the last for Python 3.6; Ubuntu's, 9.0, does not see today's wheels
KEPT = ("torch", "torchvision", "numpy")


def main(step, *folder):
    if VERSION < (3, 8) and VERSION != (3, 6):
        sys.exit(
            f"this base image has Python {VERSION[0]}.{VERSION[1]}, the client needs 3.6, or 3.8 "
            "or newer; choose another base image with --build-arg BASE=..."
        )
    if step == "install":
        install(*folder)
        return
    found = look()
    print(f"torch {found['version']} (CUDA {found['cuda']}) in {found['folder']}", flush=True)
    if step == "record":
        before = dict(found, missing=load())
        (HERE / "torch.json").write_text(json.dumps(before))
        (HERE / "constraints.txt").write_text("\n".join(constraints(found["packages"])) + "\n")
        return
    before = json.loads((HERE / "torch.json").read_text())
    missing = before.pop("missing")
    if found != before:
        sys.exit(f"torch was replaced: the base image has {before}, this one {found}")
    if load() != missing:
        sys.exit("torch loads no longer")
    if missing:
        print(f"torch is kept; not loaded, because {missing} is on the board alone")
    else:
        run_path(str(HERE / "check.py"))
        print("torch is kept, and loads")


def requirements():
    """Return the file that names what to install for this Python."""
    name = {(3, 6): "python3.6.txt"}.get(VERSION)
    return HERE / (name or ("requirements.txt" if VERSION >= (3, 11) else "python3.8.txt"))


def install(folder):
    """Install what the client needs into `folder`; for Python 3.6 also what translates it."""
    pip = [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--no-compile", "--no-deps"]
    environment = dict(os.environ)
    with_pip = Path(folder, "pip")
    if VERSION == (3, 6):
        subprocess.run([*pip, "--target", str(with_pip), f"pip=={PIP}"], check=True)
        environment["PYTHONPATH"] = str(with_pip)
    command = [*pip, "--target", folder, "-r", str(requirements())]
    subprocess.run(command, env=environment, check=True)
    if VERSION == (3, 6):
        shutil.rmtree(str(with_pip))
        shutil.copy(str(HERE / "python36.py"), folder)
        Path(folder, "sitecustomize.py").write_text("import python36\n")


def look():
    """Return what torch is, by its files."""
    folder = find_spec("torch").submodule_search_locations[0]
    torch = run_path(str(Path(folder, "version.py")))
    ours = {package(line) for line in requirements().read_text().splitlines()}
    kept = [name for name in KEPT if name not in ours and find_spec(name)]
    return {
        "folder": folder,
        "version": torch["__version__"],
        "cuda": torch["cuda"],
        "packages": {name: version(name) for name in kept},
    }


def version(name):
    """Return the version of an installed package."""
    try:
        from importlib import metadata
    except ImportError:  # before Python 3.8
        import pkg_resources

        return pkg_resources.get_distribution(name).version
    return metadata.version(name)


def load():
    """Import torch, and torchvision if there; return None, or which library is missing.

    NVIDIA's container runtime mounts the driver (libcuda.so.1, …), and on JetPack 4 all of CUDA
    (libcurand.so.10, …), when a container is run, and while an image is built only if it is
    Docker's default runtime.
    """
    names = [name for name in ("torch", "torchvision") if find_spec(name)]
    command = [sys.executable, "-c", f"import {', '.join(names)}"]
    run = subprocess.run(command, stderr=subprocess.PIPE, universal_newlines=True)  # noqa: UP021
    if run.returncode == 0:
        return None
    library = re.search(r"(lib(cu|nv)\S*): cannot open shared object file", run.stderr)
    if library:
        return library[1]
    sys.exit(f"{' and '.join(names)} do not load in this image:\n{run.stderr}")


def constraints(packages):
    """Return pip's constraints: `packages` as they are, and what the base image sets.

    But for what we install: NVIDIA's file pins every package of its image, among them a
    protobuf that is too old for the stream's messages.
    """
    ours = {package(line) for line in requirements().read_text().splitlines()}
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
    main(*sys.argv[1:])

"""The whole story on one machine: a service, its fridges, a better model back on each.

    ./run_local.sh --fridgecam                      # ten fridges, photographs that it paints
    ./run_local.sh --fridgecam --photos groceries   # service/, fridges/<name>/, val/ of your own

Each fridge is a process without torch. The table at the end shows how often each one is right on
test photographs of the classes that it has: before, after, and with its personal head.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from federated.errors import FederationError
from fridgecam.device import trainer_for
from fridgecam.home import Home
from fridgecam.watch import personalise
from head_trainer import head_scores
from plumbing import cli
from plumbing.photos import FeatureCache, labelled

ROOT = Path(__file__).resolve().parent.parent
MODELS = {128: "fridgecam.model:EffLite0Small", 224: "fridgecam.model:EffLite0"}
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
SERVICE, NOISE, TINT = 2, 60.0, 12.0  # few and varied: the start model is not good
SETTINGS = ("--batch_size=64", "--label_smoothing=0.1")  # docs/fridgecam.md says how chosen
PAINTED = ("Apple", "Cabbage", "Carrots", "Lemon", "Milk", "Tomato")


@dataclass(frozen=True)
class Sight:
    """How often a fridge is right on test photographs of its own classes, from 0 to 1."""

    fridge: str
    photos: int
    before: float
    after: float
    personal: float


def make_start(photos: Path, size: int, out: Path) -> None:
    """Run `fridgecam start` on the service's photographs, all of them."""
    command = [sys.executable, "-m", "fridgecam", "start", "--all", f"--model={MODELS[size]}"]
    done = subprocess.run(
        [*command, f"--data_dir={photos / 'service'}", f"--out={out}"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise FederationError(done.stderr.strip().rpartition("\n")[2] or "no start model")


def play(
    photos: Path, start: Path, size: int, work: Path, flags: Sequence[str], labels: int = 0
) -> None:
    """Run a server and a process for each fridge to the end; the run is in work/run.

    Args:
        flags: for server.py.
        labels: photographs of each fridge that are used; 0 is all.
    """
    fridges = sorted((photos / "fridges").iterdir())
    keys = f"--keys={work / 'keys'}"
    token = subprocess.run(
        [sys.executable, "server.py", "devices", "token", keys, f"--uses={len(fridges)}"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    server = subprocess.Popen(
        [sys.executable, "server.py", "--server_address=127.0.0.1:0", f"--model={MODELS[size]}",
         f"--init_weights={start}", f"--data_dir={photos / 'val'}", f"--run_dir={work / 'run'}",
         "--secure", keys, f"--min_num_clients={len(fridges)}", "--epochs=2",
         *flags],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    clients: list[subprocess.Popen] = []
    try:
        assert server.stdout
        address = ""
        for line in server.stdout:
            if line.startswith("waiting for"):
                address = line.split(" at ")[1].split()[0]
                break
        for fridge in fridges:
            clients.append(start_fridge(fridge, work / fridge.name, address, token, labels))
        for line in server.stdout:
            if line.startswith("round") or "model.int8.onnx, " in line:
                print(f"  {line.rstrip()}", flush=True)
        if server.wait():
            raise FederationError("the server ended with an error; see above")
        for client in clients:
            client.wait()
    finally:
        for process in (server, *clients):
            process.kill()
            process.wait()


def start_fridge(
    source: Path, folder: Path, address: str, token: str, labels: int
) -> subprocess.Popen:
    """Install a fridge with its photographs, switch sharing on, and let it train."""
    paths = sorted(source.glob("train/*/*.jpg"))
    for path in paths[:: max(1, len(paths) // labels)][:labels] if labels else paths:
        target = folder / "photos" / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    cache = folder.parent.parent / "cache"  # features are computed once for all runs
    cache.mkdir(exist_ok=True)
    (folder / "cache").symlink_to(cache)
    own, command = f"--home={folder}", [sys.executable, "-m", "fridgecam"]
    for step in (
        ["install", own, f"--server_address={address}", f"--cid={folder.name}", "--join=-"],
        ["share", own, "on"],
    ):
        done = subprocess.run(
            [*command, *step], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
            input=token,  # not on a command line, which others on this machine can read
        )  # fmt: skip
        if done.returncode:
            raise FederationError(done.stderr.strip())
    training = [*command, "train", own]
    return subprocess.Popen(training, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def compare(photos: Path, work: Path) -> list[Sight]:
    """Return what each fridge sees with the start model, the last one, and its personal head."""
    found = []
    for source in sorted((photos / "fridges").iterdir()):
        home = Home(work / source.name)
        card = home.card()
        before = home.head(personal=False)
        for name in ("card.json", "backbone.onnx", "head.safetensors"):
            shutil.copy(work / "run" / "published" / name, home.model / name)
        personalise(home)
        trainer = trainer_for(home)
        own = {photo.label for photo in labelled(home.photos, card.classes)}
        tests = [p for p in labelled(photos / "val" / "test", card.classes) if p.label in own]
        cache = FeatureCache(home.cache, trainer.backbone.features, card.frozen, card.image_size, 1)
        x, labels = cache.features(tests)
        heads = (before, home.head(personal=False), home.head())
        right = [float((head_scores(w, x[:, 0]).argmax(1) == labels).mean()) for w in heads]
        count = len(labelled(home.photos, card.classes))
        found.append(Sight(source.name, count, *right))
    return found


def paint(folder: Path) -> None:
    """Paint photographs for a service, its fridges and a test: a colour and a pattern a class."""
    from PIL import Image

    rng = np.random.default_rng(0)

    def draw(path: Path, label: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        y, x = np.mgrid[0:96, 0:96]
        pixels = rng.normal(110, NOISE, (96, 96, 3)) + rng.normal(0, TINT, 3)
        pixels[..., label % 3] += 30
        wave = np.sin((x if label < 3 else y) / rng.uniform(3, 5) + rng.uniform(0, 6))
        pixels += 25 * wave[..., None]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)

    for label, name in enumerate(PAINTED):
        for i in range(SERVICE):
            draw(folder / "service" / "train" / name / f"{i}.jpg", label)
        for i in range(10):
            draw(folder / "val" / "test" / name / f"{i}.jpg", label)
    for fridge in range(10):
        for label in rng.permutation(len(PAINTED))[:3]:
            for i in range(6):
                path = folder / "fridges" / f"{fridge:02}" / "train" / PAINTED[label] / f"{i}.jpg"
                draw(path, int(label))


def print_table(sights: Sequence[Sight]) -> None:
    print("\nright on test photographs of its own classes")
    print("fridge   photographs   before    after   personal head")
    columns = [(s.before, s.after, s.personal) for s in sights]
    rows = [(s.fridge, s.photos, right) for s, right in zip(sights, columns, strict=True)]
    mean = tuple(float(value) for value in np.mean(columns, axis=0))
    for name, count, right in [*rows, ("all", sum(row[1] for row in rows), mean)]:
        percent = "".join(f"{100 * value:7.1f} %" for value in right)
        print(f"{name:8} {count:11} {percent}")


def story(argv: list[str]) -> None:
    """Play the story of ten fridges on this machine, and show the table before and after."""
    parser = cli.Parser(prog="run_local.sh --fridgecam", description=__doc__)
    parser.flag("photos", "service/, fridges/<name>/ and val/ (default: painted)", metavar="DIR")
    parser.flag("size", "pixels a side that the model sees: 128 or 224", 128, choices=MODELS)
    parser.flag("rounds", "rounds of training", 10)
    parser.flag("lr", "learning rate at the start", 0.05)
    args = parser.parse_args(argv)
    with cli.ready("fridgecam story"), tempfile.TemporaryDirectory() as scratch:
        photos = (
            Path(args.photos).expanduser().resolve() if args.photos else Path(scratch, "photos")
        )
        if not args.photos:
            paint(photos)
        for part in ("service/train", "fridges", "val/test"):
            if not (photos / part).is_dir():
                raise FederationError(f"'{photos}' has no folder {part}")
        start, work = Path(scratch, "start.safetensors"), Path(scratch, "work")
        work.mkdir()
        print("the start model: ImageNet's backbone, a head from the service's photographs")
        make_start(photos, args.size, start)
        how = [f"--rounds={args.rounds}", f"--lr={args.lr}", *SETTINGS]
        play(photos, start, args.size, work, how)
        print_table(compare(photos, work))

"""FridgeCam's table on a folder of photographs, through real processes over gRPC.

    .venv/bin/python benchmarks/fridges.py --photos groceries

`groceries` has service/train, val/test and fridges/<name>/train, each with a folder a class.
Ten fridges without torch (python -m fridgecam train) are started for each row; the seconds and
the bytes are the server's.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fridgecam.home import Home
from fridgecam.watch import personalise
from head_trainer import head_scores
from plumbing.photos import FeatureCache, labelled

MODELS = {128: "fridgecam.model:EffLite0Small", 224: "fridgecam.model:EffLite0"}
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    flags: tuple[str, ...] = ()
    labels: int = 0  # photographs of each fridge that are used; 0 is all


ROWS = [
    Row("all present"),
    Row("3 of 10 present", ("--sample_fraction=0.3", "--min_sample_size=3")),
    Row("the service trains, too", ("--own_data={service}:1",)),
    Row("five labels a fridge", labels=5),
]


def run_row(
    row: Row, photos: Path, start: Path, model: str, seed: int, rounds: int, work: Path
) -> dict:
    """Run a server and ten fridges; return the last line of its metrics, and what fridges see."""
    fridges = sorted((photos / "fridges").iterdir())
    flags = [flag.format(service=photos / "service") for flag in row.flags]
    if not any(flag.startswith("--min_sample_size") for flag in flags):
        flags.append(f"--min_sample_size={len(fridges)}")
    server = subprocess.Popen(
        [sys.executable, "server.py", "--server_address=127.0.0.1:0", f"--model={model}",
         f"--init_weights={start}", f"--data_dir={photos / 'val'}", f"--rounds={rounds}",
         "--epochs=2", "--lr=0.02", f"--seed={seed}", f"--min_num_clients={len(fridges)}",
         f"--run_dir={work / 'run'}", *flags],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout
    address = ""
    for line in server.stdout:
        if line.startswith("waiting for"):
            address = line.split(" at ")[1].split()[0]
            break
    clients = [start_fridge(f, work / f.name, address, row.labels, work) for f in fridges]
    for line in server.stdout:
        if line.startswith("round"):
            print(f"  {line.rstrip()}", flush=True)
    assert server.wait() == 0, "the server ended with an error"
    for client in clients:
        client.wait()
    lines = (work / "run" / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


def start_fridge(
    source: Path, home: Path, address: str, labels: int, work: Path
) -> subprocess.Popen:
    """Install a fridge with its photographs, and let it train."""
    for path in sorted(source.glob("train/*/*.jpg"), key=lambda p: p.stat().st_size)[
        : labels or None
    ]:
        target = home / "photos" / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (work.parent / "cache").mkdir(exist_ok=True)
    (home / "cache").symlink_to(work.parent / "cache")  # features are computed once for all rows
    command = [sys.executable, "-m", "fridgecam"]
    own = f"--home={home}"
    for step in (["install", own, f"--server_address={address}", f"--cid={home.name}"],
                 ["share", own, "on"]):  # fmt: skip
        done = subprocess.run([*command, *step], cwd=ROOT, env=ENVIRONMENT, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    return subprocess.Popen(
        [*command, "train", own], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )


def personal_accuracy(photos: Path, run: Path, work: Path, cache: Path) -> tuple[float, float]:
    """Return how often fridges are right on test photographs of their own classes.

    With the global head, then with each fridge's personal one; the mean over fridges.
    """
    found = []
    for source in sorted((photos / "fridges").iterdir()):
        home = Home(work / source.name)
        for name in ("card.json", "backbone.onnx", "head.safetensors"):
            shutil.copy(run / "published" / name, home.model / name)
        personalise(home)
        card = home.card()
        own = {photo.label for photo in labelled(home.photos, card.classes)}
        tests = [p for p in labelled(photos / "val" / "test", card.classes) if p.label in own]
        from light_trainer import OnnxBackbone

        backbone = OnnxBackbone(home.model / "backbone.onnx")
        x, labels = FeatureCache(
            cache, backbone.features, card.frozen, card.image_size, 1
        ).features(tests)
        found.append(
            [
                float((head_scores(home.head(personal), x[:, 0]).argmax(1) == labels).mean())
                for personal in (False, True)
            ]
        )
    both = np.mean(found, axis=0)
    return float(both[0]), float(both[1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", required=True, type=Path)
    parser.add_argument("--size", type=int, default=128, choices=MODELS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=len(ROWS), help="how many rows of the table")
    args = parser.parse_args(argv)
    photos, model = args.photos.resolve(), MODELS[args.size]
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start.safetensors"
        subprocess.run(
            [sys.executable, "-m", "fridgecam", "start", "--all", f"--model={model}",
             f"--data_dir={photos / 'service'}", f"--out={start}"],
            cwd=ROOT, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for number, row in enumerate(ROWS[: args.rows]):
            results, personal = [], []
            for seed in range(args.seeds):
                work = Path(folder) / f"{number}-{seed}"
                work.mkdir()
                results.append(run_row(row, photos, start, model, seed, args.rounds, work))
                if number == 0:
                    cache = Path(folder) / "cache"
                    personal.append(personal_accuracy(photos, work / "run", work, cache))
            accuracy = [100 * result["accuracy"] for result in results]
            by_class = [
                100 * np.nanmean([v for v in r["class_accuracy"].values() if v is not None])
                for r in results
            ]
            each = ", ".join(f"{a:.1f}" for a in accuracy)
            print(
                f"{row.name}: {np.mean(accuracy):.1f} % ({each}), "
                f"mean over classes {np.mean(by_class):.1f} %",
                flush=True,
            )
            if personal:
                whole, own = np.mean(personal, axis=0)
                print(f"own classes: global head {100 * whole:.1f} %, personal {100 * own:.1f} %")


if __name__ == "__main__":
    main()

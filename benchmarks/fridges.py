"""FridgeCam's table on a folder of photographs, through real processes over gRPC.

    .venv/bin/python benchmarks/fridges.py --photos groceries

`groceries` has service/train, val/test and fridges/<name>/train, each with a folder a class. For
each row a server and a process without torch for each fridge run to the end.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fridgecam.story import MODELS, compare, make_start, play


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    flags: tuple[str, ...] = ("--min_sample_size=10",)
    labels: int = 0  # photographs of each fridge that are used; 0 is all


ROWS = [
    Row("all present"),
    Row("3 of 10 present", ("--sample_fraction=0.3", "--min_sample_size=3")),
    Row("the service trains, too", ("--min_sample_size=10", "--own_data={photos}/service:2")),
    Row("five labels a fridge", labels=5),
]


def start_accuracy(run: Path) -> float:
    """Return how good the start model is on the test photographs."""
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return next(event["accuracy"] for event in events if event["event"] == "started")


def last_line(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", required=True, type=Path)
    parser.add_argument("--size", type=int, default=128, choices=MODELS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    # Chosen on the photographs of service and fridges alone.
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--label_smoothing", type=float, default=0.1)
    parser.add_argument("--rows", default="1,2,3,4", help="which rows of the table")
    args = parser.parse_args(argv)
    photos = args.photos.resolve()
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder, "start.safetensors")
        make_start(photos, args.size, start)
        for number in map(int, args.rows.split(",")):
            row = ROWS[number - 1]
            accuracy, by_class, sights = [], [], []
            for seed in range(args.seeds):
                work = Path(folder, f"{number}-{seed}")
                work.mkdir()
                names = ("rounds", "lr", "batch_size", "label_smoothing")
                how = [f"--{name}={getattr(args, name)}" for name in names] + [f"--seed={seed}"]
                flags = [flag.format(photos=photos) for flag in row.flags]
                play(photos, start, args.size, work, [*how, *flags], row.labels)
                found = last_line(work / "run")
                begin = 100 * start_accuracy(work / "run")
                accuracy.append(100 * found["accuracy"])
                known = [v for v in found["class_accuracy"].values() if v is not None]
                by_class.append(100 * float(np.mean(known)))
                sights += compare(photos, work)
            each = ", ".join(f"{value:.1f}" for value in accuracy)
            print(f"start model: {begin:.1f} %")
            print(f"{row.name}: {np.mean(accuracy):.1f} % ({each})")
            print(f"  mean over classes {np.mean(by_class):.1f} %")
            own = np.mean([(s.before, s.after, s.personal) for s in sights], axis=0) * 100
            print(f"  own classes: start {own[0]:.1f} %, after {own[1]:.1f} %, "
                  f"personal {own[2]:.1f} %", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

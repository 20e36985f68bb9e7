"""Images a second with --threads 1, 2, … and auto, in the situations that differ most.

    python benchmarks/threads.py                     # some minutes, on an otherwise idle machine

Starts server.py and client.py as by hand: one client alone, two on one machine, one beside a
busy process. Prints the mean of the rounds after the first, in which `auto` makes its trials,
and the ratio of `auto` to the best fixed number. Each row is repeated with the sides in turn.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITUATIONS = {"one client": (1, 0), "two clients": (2, 0), "beside a busy process": (1, 1)}
BUSY = "while True: pass"


def measure(clients: int, busy: int, threads: str, args: argparse.Namespace) -> float:
    """Return the images a second of all clients together, after the first round."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    common = ["--server_address", address, "--model", args.model]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as started:

        def start(*command: str) -> subprocess.Popen:
            process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
            started.callback(process.wait)
            started.callback(process.kill)
            return process

        for cid in range(clients):
            flags = [*common, "--cid", str(cid), "--threads", threads, "--keys", scratch]
            start(str(ROOT / "client.py"), *flags, "--data_dir", f"synthetic:{args.images}")
        for _ in range(busy):
            start("-c", BUSY)
        flags = [*common, "--rounds", str(args.rounds), "--run_dir", f"{scratch}/run"]
        flags += ["--min_num_clients", str(clients), "--data_dir", "synthetic:400"]
        flags += ["--threads", "1", "--page", "off", "--partition", "none"]
        if start(str(ROOT / "server.py"), *flags).wait():
            sys.exit(f"threads.py: a run with --threads {threads} failed")
        rows = [*map(json.loads, Path(f"{scratch}/run/metrics.jsonl").read_text().splitlines())]
    return statistics.mean(
        sum(device["metrics"]["images_per_second"] for device in row["devices"]) for row in rows[1:]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Net")
    parser.add_argument("--images", type=int, default=25_000, help="that each client trains on")
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: 2 or more, the first one does not count")
    fixed = [str(number) for number in range(1, (os.cpu_count() or 1) + 1)]
    names = [*fixed, "auto"]
    print("| images/s, all clients | " + " | ".join(f"--threads {n}" for n in names) + " | ratio |")
    print("| --- |" + " --- |" * (len(names) + 1))
    for situation, (clients, busy) in SITUATIONS.items():
        found: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(args.repeats):
            for name in names:
                found[name].append(measure(clients, busy, name, args))
        median = {name: statistics.median(rates) for name, rates in found.items()}
        ratio = median["auto"] / max(median[name] for name in fixed)
        cells = [
            f"{median[name]:,.0f} ({min(found[name]):,.0f} to {max(found[name]):,.0f})"
            for name in names
        ]
        print(f"| {situation} | " + " | ".join(cells) + f" | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""The same run over the stream, in a simulation and on a SuperLink with SuperNodes.

    python benchmarks/two_roads.py --data_dir /data/images --rounds 3

Prints for each road the accuracy after each round, the median seconds of a round from the
second on, and what two devices' processes hold of memory: at rest between two messages
(the least that was seen after the first round) and at most. Needs requirements-engine.txt.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
EVERY_SECONDS = 0.3  # between two looks at the memory
FLAGS = ("rounds", "seed", "lr", "model", "batch_size")


def memory_of_nodes() -> float:
    """Return the megabytes that the two devices' processes hold together."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            if "client.py" in command or "ClientAppActor" in command:
                found[process.pid] = process
            elif "flower-supernode" in command:
                found |= {p.pid: p for p in (process, *process.children(recursive=True))}
        except psutil.Error:
            continue
    total = 0
    for process in found.values():
        try:
            total += process.memory_full_info().pss  # what processes share counts once
        except psutil.Error:
            continue
    return total / 1e6


def watch(run: subprocess.Popen, run_dir: Path) -> tuple[float, float]:
    """Wait for the end; return the least and the most memory of the devices."""
    least, most = float("inf"), 0.0
    while run.poll() is None:
        now = memory_of_nodes()
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and now:
            least, most = min(least, now), max(most, now)
        time.sleep(EVERY_SECONDS)
    return least, most


def on_the_stream(flags: list[str], data_dir: str, threads: int, run_dir: Path) -> subprocess.Popen:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    common = ["--server_address", address, "--data_dir", data_dir]
    server = [*flags, *common, "--partition", "iid", "--run_dir", str(run_dir)]
    for cid in "01":
        client = [*common, "--cid", cid, "--threads", str(threads), "--insecure"]
        model = [flag for flag in flags if flag.startswith("--model=")]
        subprocess.Popen(
            [sys.executable, ROOT / "client.py", *client, *model], stdout=subprocess.DEVNULL
        )
    return subprocess.Popen(
        [sys.executable, ROOT / "server.py", *server], stdout=subprocess.DEVNULL
    )


def on_the_engine(
    flags: list[str], data_dir: str, threads: int, run_dir: Path, *more: str
) -> subprocess.Popen:
    command = [sys.executable, "-m", "plumbing.engine", *flags, *more, "--data_dir", data_dir]
    command += ["--partition", "iid", "--threads", str(threads), "--run_dir", str(run_dir)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", default="synthetic:2000")
    parser.add_argument("--threads", type=int, default=1)
    for name, default in zip(FLAGS, ("3", "0", "0.05", "Net", "32"), strict=True):
        parser.add_argument(f"--{name}", default=default)
    args = parser.parse_args()
    flags = [f"--{name}={getattr(args, name)}" for name in FLAGS]
    print(f"{'road':<12} {'s a round':>9}  {'MB at rest':>10}  {'MB at most':>10}  accuracy")
    for road in ("stream", "simulation", "SuperLink"):
        with tempfile.TemporaryDirectory() as scratch:
            run_dir = Path(scratch) / "run"
            setting = (flags, args.data_dir, args.threads, run_dir)
            if road == "stream":
                run = on_the_stream(*setting)
            else:
                run = on_the_engine(*setting, *(["--superlink"] if road == "SuperLink" else []))
            least, most = watch(run, run_dir)
            if run.returncode:
                sys.exit(f"two_roads.py: the run on the {road} failed")
            rows = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
        seconds = statistics.median(row["seconds"] - row["seconds_evaluate"] for row in rows[1:])
        accuracy = " ".join(f"{100 * row['accuracy']:.2f}" for row in rows)
        print(f"{road:<12} {seconds:9.2f}  {least:10.0f}  {most:10.0f}  {accuracy}", flush=True)


if __name__ == "__main__":
    main()

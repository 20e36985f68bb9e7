"""How this checkout compares with another one: time and memory, side by side.

    git worktree add ../before <COMMIT>
    python benchmarks/compare.py --against ../before
    python benchmarks/compare.py --against ../before --measure round-ResNet18 --repeats 9

Each measurement is made by a checkout's own benchmarks and product code, in a process of its
own. The two checkouts take turns, and a ratio is taken between neighbours in one turn, so that
other load on the machine weighs on both.

    round-MODEL, round-MODEL-tls    ms a round without training (round_overhead.py)
    memory-N                        peak MB of the server with N light ResNet18 devices
    epoch                           s for a local epoch of Net over 6,400 images (local_epoch.py)
    client-start                    s of processor time until a client has reached its server
    client-memory                   MB that are resident in a client that waits for a round
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run from anywhere

PATIENCE_SECONDS = 1800  # for one measurement

# What a checkout runs, in Python; it prints the number.
ROUND = "from benchmarks import round_overhead as b; print(1000 * b.take_turn({!r}, {!r}, {}, 2))"
MEMORY = "from benchmarks import server_memory as b; print(b.measure('ours', {!r}, 3, {})[1])"
EPOCH = """
import time
from benchmarks import local_epoch as b
data = b.some_images("synthetic:8000", {})
b.our_epoch(data)
seconds = []
for _ in range(3):
    start = time.perf_counter()
    b.our_epoch(data)
    seconds.append(time.perf_counter() - start)
print(min(seconds))
"""
# A server of the checkout waits for a second device, so that the first one stays connected.
CLIENT = """
import os, re, subprocess, sys, tempfile, time
from pathlib import Path

def start(*command):
    return subprocess.Popen(
        [sys.executable, "-u", *command, "--model=Net", "--data_dir=synthetic:400"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )

with tempfile.TemporaryDirectory() as directory:
    server = start("server.py", "--server_address=127.0.0.1:0", f"--run_dir={{directory}}/run")
    try:
        address = next(m[1] for line in server.stdout if (m := re.search(r"at (127\\S+) ", line)))
        client = start("client.py", f"--server_address={{address}}", "--cid=0", "--insecure")
        try:
            next(line for line in client.stdout if "connected to" in line)
            ticks = Path(f"/proc/{{client.pid}}/stat").read_text().rpartition(")")[2].split()[11:13]
            seconds = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
            time.sleep(1)
            status = Path(f"/proc/{{client.pid}}/status").read_text()
            megabytes = int(re.search(r"VmRSS:\\s+(\\d+)", status)[1]) * 1024 / 1e6
        finally:
            client.kill()
            client.wait()
    finally:
        server.kill()
        server.wait()
print({})
"""

MEASURES = {
    "round-Net": ROUND.format("ours", "Net", 200),
    "round-Net-tls": ROUND.format("tls", "Net", 200),
    "round-ResNet18": ROUND.format("ours", "ResNet18", 12),
    "round-ResNet18-tls": ROUND.format("tls", "ResNet18", 12),
    "memory-20": MEMORY.format("ResNet18", 20),
    "memory-50": MEMORY.format("ResNet18", 50),
    "epoch": EPOCH.format(6400),
    "client-start": CLIENT.format("seconds"),
    "client-memory": CLIENT.format("megabytes"),
}
SHORT = {
    "round-Net": ROUND.format("ours", "Net", 5),
    "memory-2": MEMORY.format("Net", 2),
    "epoch": EPOCH.format(640),
    "client-memory": CLIENT.format("megabytes"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="compare this checkout with another one")
    parser.add_argument("--against", type=Path, required=True, metavar="DIR")
    parser.add_argument("--measure", nargs="+", choices=MEASURES, help="default: all")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--short", action="store_true", help="a quick form, 1 repeat")
    args = parser.parse_args()
    if not (args.against / "benchmarks").is_dir():
        sys.exit(f"compare.py: '{args.against}' is no checkout of this project")
    measures = SHORT if args.short else MEASURES
    for name in args.measure or measures:
        compare(name, measures[name], args.against, 1 if args.short else args.repeats)


def compare(name: str, code: str, other: Path, repeats: int) -> None:
    """Let both checkouts take turns, and print what they took."""
    sides = {"this": ROOT, "other": other}
    figures: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(repeats):
        for side in sides if repeat % 2 else reversed(sides):
            figures[side].append(measure(code, sides[side]))
        this, that = (figures[side][-1] for side in sides)
        print(
            f"{name:18}  turn {repeat + 1}/{repeats}  this {this:8.2f}  other {that:8.2f}  "
            f"ratio {this / that:.3f}",
            flush=True,
        )
    ratios = [a / b for a, b in zip(figures["this"], figures["other"], strict=True)]
    medians = "  ".join(f"{side} {statistics.median(figures[side]):.2f}" for side in sides)
    print(
        f"{name:18}  this/other  min {min(ratios):.3f}  median {statistics.median(ratios):.3f}  "
        f"max {max(ratios):.3f}  (medians: {medians})",
        flush=True,
    )


def measure(code: str, checkout: Path) -> float:
    """Return the number that `code` prints in a checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    if done.returncode != 0:
        sys.exit(f"compare.py: a measurement failed in '{checkout}':\n{done.stderr}")
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()

"""What breaks, and what comes of it: runs the tests of faults and prints what they saw.

    python tests/faults/report.py            # some minutes
    python tests/faults/report.py --long     # an hour: more kills, longer waits, larger fleets

Other arguments, such as the path of one file, go to pytest. "noticed after" is from the fault
until it is reported. The last column is stock Flower's start_server and start_client, flwr
1.41.0 as they come, measured on 2 x86-64 cores with grpcio 1.85.1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def table(rows: list[dict[str, object]]) -> str:
    """Return the rows that `record_fault` wrote as Markdown."""
    lines = [
        "| fault | injected | what happened | noticed after | stock Flower |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        seconds = row["noticed_seconds"]
        noticed = f"{seconds:.2f} s" if isinstance(seconds, int | float) else ""
        cells = (row["fault"], row["injected"], row["happened"], noticed, row["stock"])
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="the long forms of the tests")
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records"
        records.touch()
        environment = {**os.environ, "FAULT_RECORDS": str(records)}
        if args.long:
            environment["LONG"] = "1"
        paths = [] if any(Path(word.partition("::")[0]).exists() for word in rest) else [HERE]
        command = [sys.executable, "-m", "pytest", *paths, *rest]
        code = subprocess.run(command, env=environment, cwd=HERE.parents[1], check=False).returncode
        rows = [json.loads(line) for line in records.read_text().splitlines()]
    print(f"\n{table(rows)}")
    sys.exit(code)


if __name__ == "__main__":
    main()

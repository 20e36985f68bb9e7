"""A device whose training anybody can work out: it adds a number to every weight.

    python tests/faults/device.py 127.0.0.1:8080 0 --add 1 --gate DIR

Everything else is the product's: joining, answering, coming back. It starts in a third of
the time of client.py, because it needs no torch.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
import logging
import time
import zlib
from typing import Any

import numpy as np

from federated.errors import FederationError
from plumbing.security.identity import open_identity
from plumbing.stream import device as transport
from tests.devices import Adder


class GatedAdder(Adder):
    """Adds to each weight, in each round once there is a file for it."""

    def __init__(self, cid: str, add: float, gate: Path | None) -> None:
        super().__init__(cid, add)
        self.gate = gate

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        classes = json.dumps([f"pattern {i}" for i in range(10)])  # of the synthetic images
        return {"cid": self.cid, "model": "Net", "classes": classes}

    def fit(
        self, parameters: list[np.ndarray], config: dict[str, Any]
    ) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        server_round = config["server_round"]
        crc = 0
        for array in parameters:
            crc = zlib.crc32(array, crc)
        print(f"fit of round {server_round} from {crc:08x}", flush=True)
        while self.gate and not (self.gate / f"round-{server_round}").exists():
            time.sleep(0.02)
        return super().fit(parameters, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server_address")
    parser.add_argument("cid")
    parser.add_argument("--add", type=float, default=1.0, help="to each weight in each round")
    parser.add_argument("--gate", type=Path, help="train until there is a file round-N in here")
    parser.add_argument("--max_pause", type=float, help="between two attempts to connect, in s")
    parser.add_argument("--max_wait_seconds", type=float, default=60.0)
    parser.add_argument("--stay", action="store_true", help="as client.py's")
    parser.add_argument("--join", metavar="TOKEN", help="as client.py's")
    parser.add_argument("--keys", type=Path, help="as client.py's; without it the server is open")
    args = parser.parse_args()
    if args.max_pause:
        transport.MAX_PAUSE_SECONDS = transport.MIN_PAUSE_SECONDS = args.max_pause
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    device = GatedAdder(args.cid, args.add, args.gate)
    began = time.monotonic()
    try:
        identity = args.keys and open_identity(args.keys, args.cid, args.join)
        transport.serve(
            args.server_address,
            device,
            lambda state: None,
            args.max_wait_seconds,
            args.stay,
            identity=identity,
        )
    except FederationError as error:
        print(f"after {time.monotonic() - began:.2f} s", flush=True)
        sys.exit(f"device.py: {error}")


if __name__ == "__main__":
    main()

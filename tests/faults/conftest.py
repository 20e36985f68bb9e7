"""What the tests of faults share: how to inject a fault and record its outcome."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Process


@pytest.fixture
def record_fault() -> Callable[..., None]:
    """Note a row for report.py's table.

    Args:
        fault: what goes wrong, in an operator's words.
        injected: how this test makes it go wrong.
        happened: what the run did about it, as asserted.
        noticed_seconds: from the fault until it is reported; None where that is of no interest.
        stock: what stock Flower does, as measured (report.py has the versions).
    """

    def record(
        fault: str,
        injected: str,
        happened: str,
        noticed_seconds: float | None = None,
        stock: str = "not measured",
    ) -> None:
        row = {
            "fault": fault,
            "injected": injected,
            "happened": happened,
            "noticed_seconds": noticed_seconds,
            "stock": stock,
        }
        if path := os.environ.get("FAULT_RECORDS"):
            with Path(path).open("a") as file:
                file.write(json.dumps(row) + "\n")

    return record


@pytest.fixture
def start_device(launch: Callable[..., Process]) -> Callable[..., Process]:
    """Start tests/faults/device.py against a server."""

    def start(address: str, cid: str | int, *arguments: str | Path) -> Process:
        return launch(sys.executable, ROOT / "tests/faults/device.py", address, cid, *arguments)

    return start


@pytest.fixture
def edited_client(launch: Callable[..., Process], tmp_path: Path) -> Callable[..., Process]:
    """Start client.py beside a utils.py in which a user has replaced a line."""

    def start(address: str, cid: str | int, line: str, replacement: str) -> Process:
        home = tmp_path / f"edited-{cid}"
        home.mkdir()
        for room in ("federated", "plumbing"):
            (home / room).symlink_to(ROOT / room)
        for name in ("client.py", "resnet.py", "torch_trainer.py"):
            (home / name).write_text((ROOT / name).read_text())
        text = (ROOT / "utils.py").read_text()
        assert text.count(line) == 1, f"{line!r} is not once in utils.py"
        (home / "utils.py").write_text(text.replace(line, replacement))
        return launch(
            sys.executable,
            home / "client.py",
            f"--server_address={address}",
            f"--cid={cid}",
            "--data_dir=synthetic:400",
            "--max_wait_seconds=60",
        )

    return start


def token_of(server: Process) -> str:
    """Return the token that a secured server has printed."""
    (line,) = [line for line in server.lines if "--join=" in line]
    return line.partition("--join=")[2].split()[0]

"""Ten fridges at a server with --secure: all see better; one vanishes, opts out, only looks."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import utils
from fridgecam.device import identity_of, update
from fridgecam.home import Home
from plumbing.checkpoints import encode_weights
from plumbing.security.identity import open_identity
from tests.conftest import ROOT
from tests.fridges import draw

CLASSES = ["Cabbage", "Milk", "Tomato"]
MODEL = "tests.tiny_model:Tiny"
KILLED, OPTS_OUT, LOOKS, SHARED_WITH = "7", "8", "9", range(9)


@pytest.fixture
def server(start_server, tmp_path):
    """A service with a start model that begins a round each half second."""
    for part, count in (("train", 4), ("test", 5)):
        for label, name in enumerate(CLASSES):
            for i in range(count):
                draw(tmp_path / "service" / part / name / f"{i}.jpg", label, i)
    net = utils.build_model(MODEL, len(CLASSES))
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    (tmp_path / "start.safetensors").write_bytes(encode_weights(state, {}))
    return start_server(
        "--secure", "--open_ended", model=MODEL, every="0.5", min_num_clients="7", epochs="10",
        lr="0.1",
        init_weights=str(tmp_path / "start.safetensors"), data_dir=str(tmp_path / "service"),
        partition="none", keys=str(tmp_path / "authority"),
    )  # fmt: skip


def install(home: Home, address: str, token: str) -> None:
    """Do what `fridgecam install` does; test_story.py runs the command."""
    home.make()
    identity = open_identity(home.keys, home.folder.name, token)
    identity.prepare(address, 20.0)
    home.change(server_address=address, cid=home.folder.name)
    assert update(home, identity)


def rows_of(run: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (FileNotFoundError, ValueError):  # a line that is just being written
        return []


def rounds(run: Path) -> list[dict[str, int]]:
    """Return for each round how many photographs each fridge trained on."""
    rows = rows_of(run)
    return [
        {d["name"][len("device ") :]: d["num_examples"] for d in row["devices"]} for row in rows
    ]


def wait_for_round(run: Path, true, seconds: float = 60) -> int:
    """Return the number of the first round for which `true` holds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for index, row in enumerate(rounds(run)):
            if true(index, row):
                return index
        time.sleep(0.05)
    raise AssertionError(f"no such round; the last ones are {rounds(run)[-3:]}")


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def stopped_in_a_round(run: Path, *processes: int) -> None:
    """Stop processes, and wait until a round waits for them."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    known = -1
    while known != (known := len(rounds(run))):
        time.sleep(2.5)  # the next round would have begun after 0.5 s


def test_ten_fridges_see_better_while_some_come_and_go(server, launch, tmp_path):
    process, address = server
    token = process.output.split("--join=")[1].split()[0]
    homes, run = [Home(tmp_path / str(number)) for number in range(10)], tmp_path / "run"

    def fridge(number: int | str, command: str, *arguments: str):
        own = f"--home={homes[int(number)].folder}"
        return launch(sys.executable, "-m", "fridgecam", command, own, *arguments, cwd=ROOT)

    first = [f"--server_address={address}", "--cid=0", f"--join={token}"]
    installed = fridge(0, "install", *first)
    assert installed.finish() == 0, installed.output
    assert "3 classes" in installed.output
    refused = fridge(0, "train")
    assert (refused.finish(), "sharing is off" in refused.output) == (1, True)
    for number, home in enumerate(homes):
        if number:
            install(home, address, token)
        for i in range(6 if number in SHARED_WITH else 0):
            label = (number + i % 2) % 3
            draw(home.photos / CLASSES[label] / f"{i}.jpg", label, 100 * number + i)
        home.change(share=True)

    running = {n: fridge(n, "train", "--stay") for n in map(str, range(8))}
    running[OPTS_OUT] = fridge(OPTS_OUT, "watch", "--every=600")
    running[LOOKS] = fridge(LOOKS, "watch", "--every=600")
    everybody = {str(number): 6 for number in SHARED_WITH}
    wait_for_round(run, lambda _, row: row == everybody)
    wait_for_round(run, lambda index, _: index > 3 and rows_of(run)[index]["accuracy"] > 0.9)

    (child,) = children(running[OPTS_OUT].popen.pid)
    stopped_in_a_round(run, running[KILLED].popen.pid, child)
    done = len(rounds(run))
    draw(homes[0].photos / "Milk" / "new.jpg", 1, 999)  # between two rounds
    homes[1].exclude.write_text("5.jpg\n")
    running[KILLED].signal(signal.SIGKILL)
    assert fridge(OPTS_OUT, "share", "off").finish() == 0
    running[OPTS_OUT].wait_for("sharing is off: training stops")
    last = wait_for_round(run, lambda index, row: index > done + 1)
    found = rounds(run)
    rest = {n: count for n, count in everybody.items() if n not in (KILLED, OPTS_OUT)}
    assert found[done].keys() == rest.keys(), "a reply counts of a fridge that is gone"
    assert found[last] == {**rest, "0": 7, "1": 5}

    running[KILLED] = fridge(KILLED, "train", "--stay")  # its battery was changed
    wait_for_round(run, lambda index, row: index > last and KILLED in row)
    assert not any(OPTS_OUT in row for row in rounds(run)[done:])
    events = (run / "events.jsonl").read_text()
    joined = {e["cid"] for e in map(json.loads, events.splitlines()) if e["event"] == "joined"}
    assert joined == {*everybody}  # who only looks never does

    assert fridge(6, "share", "off").finish() == 0  # without `watch`, too
    assert running["6"].finish() == 0
    assert "sharing is off: training stops" in running["6"].output

    drawn = draw(homes[9].inbox / "another.jpg", 1)
    running[LOOKS].wait_for(rf"{drawn.name}: (Cabbage|Milk|Tomato) ")
    before = homes[9].card().version
    assert update(homes[9], identity_of(homes[9]))
    assert homes[9].card().version > before

"""A fridge's day: look at new pictures, train when asked, fetch better models."""

import contextlib
import io
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from federated.errors import FederationError, NotYet, Refused
from federated.settings import Settings
from fridgecam.device import identity_of, trainer_for, update
from fridgecam.home import HEAD, PERSONAL, Home
from fridgecam.look import home_of, parser_for
from plumbing import cli
from plumbing.photos import is_photo, labelled
from plumbing.stream.fetch import send_judgement

TICK_SECONDS = 1.0
# Gently; chosen on photographs of service and fridges that trained neither model.
PERSONAL_SETTINGS = Settings(
    lr=0.005, lr_end=0.0, epochs=10, weight_decay=1e-3, sampling="balanced"
)


def watch(argv: list[str]) -> None:
    """Look at new pictures in inbox/, train when the server asks, fetch better models."""
    parser = parser_for("watch", watch.__doc__ or "")
    parser.flag("every", "seconds from one look for a newer model to the next", 60.0, metavar="S")
    args = parser.parse_args(argv)
    with cli.ready("fridgecam watch"):
        home = home_of(args)
        home.card()
        with training(home) as keep:
            looked, due = photos_in_inbox(home), 0.0
            while True:
                if time.monotonic() >= due:
                    due = time.monotonic() + args.every
                    if fetch_better(home):
                        keep(restart=True)
                keep()
                if new := photos_in_inbox(home) - looked:
                    looked |= new
                    command(home, "look", *map(str, sorted(new)))
                time.sleep(TICK_SECONDS)


def photos_in_inbox(home: Home) -> set[Path]:
    return {p for p in home.inbox.glob("*") if is_photo(p)} if home.inbox.is_dir() else set()


def command(home: Home, *arguments: str) -> None:
    """Run a command in a process of its own, which gives its memory back."""
    own = [sys.executable, "-m", "fridgecam", arguments[0], f"--home={home.folder}"]
    subprocess.run([*own, *arguments[1:]], check=False)


@contextlib.contextmanager
def training(home: Home) -> Iterator[Any]:
    """Yield what keeps a training process alive exactly as long as the owner shares.

    It looks at the switch itself, since this one may be busy with a new model; and it is killed
    from here, should it hang. Nothing more is sent, and a reply that was under way does not count.
    """
    child: subprocess.Popen | None = None
    pause_until = 0.0

    def stop() -> None:
        nonlocal child
        if child:
            child.send_signal(signal.SIGKILL)
            child.wait()
            child = None

    def keep(restart: bool = False) -> None:
        nonlocal child, pause_until
        if child and child.poll() is not None:
            if home.shares:  # refused, or the run is over
                pause_until = time.monotonic() + 30
            child = None
        if child and (restart or not home.shares):
            why = "another model is here: training starts again"
            print(why if home.shares else "sharing is off: training stops")
            stop()
        if not child and home.shares and has_photos(home) and time.monotonic() >= pause_until:
            own = [sys.executable, "-m", "fridgecam", "train", f"--home={home.folder}", "--stay"]
            child = subprocess.Popen(own)

    try:
        yield keep
    finally:
        stop()


def has_photos(home: Home) -> bool:
    """Return whether there is anything to train on."""
    return bool(labelled(home.photos, home.card().classes, home.excluded()))


def fetch_better(home: Home) -> bool:
    """Fetch the newest model, if it is no worse here; return whether the frozen part is new."""
    before = home.card().frozen
    counts: list[tuple[int, tuple[int, int, int]]] = []

    def accept(card: Mapping[str, Any], files: Mapping[str, Path]) -> bool:
        found = judge(home, files) if card.get("frozen") == before else (0, 0, 0)
        counts.append((card["version"], found))
        return is_accepted(*found)

    try:
        identity = identity_of(home)
        new = update(home, identity, accept)
        for version, (held_out, right, wrong) in counts:
            what = "installed" if new else "not installed: it is worse on this fridge's photographs"
            print(f"model {version}: {held_out} held out, {right} newly right, {wrong} newly wrong")
            print(f"model {version} is {what}")
            if home.shares:
                address = home.config["server_address"]
                send_judgement(address, identity, version, (held_out, right, wrong))
        if new:
            personalise(home)
    except (NotYet, Refused) as error:
        print(f"no newer model: {error}")
        return False
    except FederationError as error:
        print(error)
        return False
    return home.card().frozen != before


def judge(home: Home, files: Mapping[str, Path]) -> tuple[int, int, int]:
    """Compare a new head with the one that is here, on the photographs that are held out."""
    from safetensors.numpy import load_file

    if not has_photos(home):
        return 0, 0, 0
    new = load_file(files[HEAD])
    order = home.card().head
    if any(list(new[name].shape) != shape for name, shape in order.items() if name in new):
        return 0, 0, 0  # another number of classes: nothing to compare
    return trainer_for(home).compare(home.head(personal=False), {n: new[n] for n in order})


def is_accepted(held_out: int, right: int, wrong: int) -> bool:
    """Return whether a model may be installed: not if it is clearly worse here."""
    return held_out < 5 or wrong - right < max(2, held_out / 10)


def personalise(home: Home) -> None:
    """Fine-tune a copy of the head on this fridge's photographs; it is never sent."""
    from safetensors.numpy import save

    from plumbing.files import write_whole

    if not has_photos(home):
        return
    trainer, card = trainer_for(home), home.card()
    trainer.validates = False  # what is held out judges the common models: it may train this one
    if not trainer.scan():
        return
    with contextlib.redirect_stdout(io.StringIO()):  # its lines are about rounds
        weights, _, _ = trainer.fit(home.head(personal=False), PERSONAL_SETTINGS)
    version = np.array([card.version], np.int64)
    write_whole(home.model / PERSONAL, save({**weights, "version": version}))

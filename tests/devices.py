"""Fake devices for all tests: a fleet in memory, and a device that anybody can follow."""

import collections
import contextlib
import io
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from federated.errors import BadReply
from federated.rounds import (
    LOST,
    Device,
    Event,
    Fleet,
    Freed,
    Job,
    Joined,
    Left,
    Offered,
    Result,
    Resumed,
)
from federated.updates import Weights, make_update
from plumbing.report import Console
from plumbing.security.identity import Identity
from plumbing.stream import device as transport
from plumbing.stream import wire

Answer = tuple[Weights, int] | BadReply | None  # None: nothing yet
Reply = Callable[[Job], Answer]


def adding(number: float, num_examples: int = 10) -> Reply:
    """Return a device's answer to a job: it adds a number to every float, 1 to a counter."""
    return lambda job: (
        {
            name: array + array.dtype.type(number if array.dtype.kind == "f" else 1)
            for name, array in job.model.items()
        },
        num_examples,
    )


def silent(job: Job) -> None:
    """Never answer."""


def in_turn(*replies: Reply) -> Reply:
    """Return the answers of one reply after the other; the last one's from then on."""
    left = list(replies)
    return lambda job: (left.pop(0) if len(left) > 1 else left[0])(job)


@dataclass
class MemoryFleet(Fleet):
    """Devices in a list: they answer in the order in which they were asked.

    Args:
        replies: what each device answers, by its cid.
    """

    replies: dict[str, Reply]
    properties: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.events: collections.deque[Event] = collections.deque()
        self.asked: list[tuple[str, Job]] = []
        self.abandoned: list[str] = []
        self.revoked_cids: set[str] = set()
        for cid in self.replies:
            self.join(cid)

    def join(self, cid: str) -> Device:
        device = Device(cid, self.properties.get(cid, {}))
        self.events.append(Joined(device))
        return device

    def revoked(self, devices: Iterable[Device]) -> list[Device]:
        return [device for device in devices if device.cid in self.revoked_cids]

    def settle(self) -> None:
        """Take all events now."""
        while self.events:
            self.wait()

    def leave(self, cid: str, reason: str = LOST) -> None:
        self.events.append(Left(self.devices[cid], reason))

    def come_back(self, cid: str, job: Job) -> None:
        """Join again with a job that was lost, and give what was trained."""
        device = self.join(cid)
        self.events.append(Resumed(device, job))
        self.give(device, job, self.replies[cid](job))

    def free(self, cid: str) -> None:
        """End a job that nobody waits for any more."""
        self.events.append(Freed(self.devices[cid]))

    def give(self, device: Device, job: Job, answer: Answer) -> None:
        """Let the schedule have a device's answer to a job."""
        if answer is None:
            return
        self.events.append(Offered(device, job))
        if isinstance(answer, BadReply):
            self.events.append(Result(device, job, None, str(answer), at_fault=True))
            return
        weights, num_examples = answer
        try:
            update = make_update(weights.values(), job.model, num_examples, {"loss": 1.0})
        except BadReply as error:
            self.events.append(Result(device, job, None, str(error), at_fault=True))
            return
        self.events.append(Result(device, job, update, seconds=1.0))

    def _start(self, device: Device, job: Job) -> None:
        self.asked.append((device.cid, job))
        self.give(device, job, self.replies[device.cid](job))

    def _abandon(self, device: Device, job: Job, patience: float | None) -> None:
        self.abandoned.append(device.cid)

    def _next(self, timeout: float | None) -> Event | None:
        if self.events:
            return self.events.popleft()
        if timeout is None:
            raise AssertionError("the schedule waits for what never comes")
        time.sleep(timeout)
        return None


def greeting(cid: str, **properties: object) -> dict[str, Any]:
    """Return what a device reports of itself, where a test speaks the stream by hand."""
    return {"cid": cid, wire.VERSION: wire.PROTOCOL, **properties}


class Adder:
    """What a device answers on the stream: it adds `step` to each weight."""

    def __init__(self, cid: str, step: float = 1.0, num_examples: int = 10) -> None:
        self.cid = cid
        self.step = step
        self.num_examples = num_examples
        self.connections = 0

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"cid": self.cid, "greeted_with": config.get("seed", -1)}

    def fit(
        self, parameters: list[np.ndarray], config: dict[str, Any]
    ) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        trained = [np.asarray(p + self.step, p.dtype) for p in parameters]
        return trained, self.num_examples, {"proximal_mu": config.get("proximal_mu", -1.0)}

    def evaluate(
        self, parameters: list[np.ndarray], config: dict[str, Any]
    ) -> tuple[float, int, dict[str, Any]]:
        """Report the first weight as the loss."""
        return float(parameters[0].flat[0]), self.num_examples, {"lr": config.get("lr", -1.0)}

    def serve(
        self,
        address: str,
        max_wait_seconds: float | None = 20,
        identity: Identity | None = None,
    ) -> None:
        """Be a device in this thread, until the run is over."""

        def note(state: str) -> None:
            self.connections += state.startswith("connected")

        transport.serve(address, self, note, max_wait_seconds, identity=identity)


class Recorder:
    """Takes a fleet's events as a schedule does, and keeps them."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.events: list[Event] = []

    def until(self, done: Callable[[], object], seconds: float = 20) -> None:
        """Take events until `done()`; AssertionError when that takes too long."""
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            assert left > 0, f"not within {seconds} s; so far: {self.lines()}"
            if event := self.fleet.wait(min(left, 0.05)):
                self.events.append(event)

    def drain(self) -> None:
        """Take the events that are there already."""
        while event := self.fleet.wait(0):
            self.events.append(event)

    def wait_for(self, count: int, seconds: float = 20) -> list[Device]:
        """Take events until so many devices are connected; return them by name."""
        self.until(lambda: len(self.fleet.devices) >= count, seconds)
        return [device for _, device in sorted(self.fleet.devices.items())]

    def exchange(
        self,
        model: Weights,
        job_id: str = "1",
        seconds: float = 20,
        kind: Literal["train", "evaluate"] = "train",
        **config: object,
    ) -> list[Result]:
        """Give all idle devices a job; return their results by the device's name."""
        job = Job(job_id, 0, model, config, kind)  # type: ignore[arg-type]
        asked = self.fleet.idle()
        for device in asked:
            self.fleet.start(device, job)
        first = len(self.events)

        def results() -> list[Result]:
            return [e for e in self.events[first:] if isinstance(e, Result) and e.job is job]

        self.until(lambda: len(results()) == len(asked), seconds)
        return sorted(results(), key=lambda result: result.device.cid)

    def lines(self) -> list[str]:
        """Return the events as people read them."""
        console = Console("here", 1, "")
        lines = []
        for event in self.events:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                console(event)
            lines += printed.getvalue().splitlines()
        return lines


def small_model() -> Weights:
    """Return a model of two arrays of floats and a counter."""
    return {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3) / 8 + 1,
        "n": np.array(3, np.int64),
        "b": np.ones(2, np.float32),
    }

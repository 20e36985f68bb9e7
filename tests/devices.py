"""Fake devices for all tests: a fleet in memory, and a device that anybody can follow."""

import collections
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from federated.errors import BadReply
from federated.rounds import Device, Event, Fleet, Job, Joined, Offered, Result
from federated.updates import Weights, make_update

Reply = Callable[[Job], "tuple[Weights, int] | BadReply | None"]


def adding(number: float, num_examples: int = 10) -> Reply:
    """Return a device's answer to a job: it adds a number to every weight."""
    return lambda job: (
        {name: array + array.dtype.type(number) for name, array in job.model.items()},
        num_examples,
    )


def silent(job: Job) -> None:
    """Never answer."""


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

    def _start(self, device: Device, job: Job) -> None:
        self.asked.append((device.cid, job))
        answer = self.replies[device.cid](job)
        if answer is None:
            return
        self.events.append(Offered(device, job))
        if isinstance(answer, BadReply):
            self.events.append(Result(device, job, None, str(answer), at_fault=True))
            return
        weights, num_examples = answer
        try:
            update = make_update(iter(weights.values()), job.model, num_examples)
        except BadReply as error:
            self.events.append(Result(device, job, None, str(error), at_fault=True))
            return
        self.events.append(Result(device, job, update, seconds=1.0))

    def _abandon(self, device: Device, job: Job, patience: float | None) -> None:
        self.abandoned.append(device.cid)

    def _next(self, timeout: float | None) -> Event | None:
        if self.events:
            return self.events.popleft()
        if timeout is None:
            raise AssertionError("the schedule waits for what never comes")
        return None


def small_model() -> Weights:
    """Return a model of two arrays of floats and a counter."""
    return {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3) / 8 + 1,
        "n": np.array(3, np.int64),
        "b": np.ones(2, np.float32),
    }

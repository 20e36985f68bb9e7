"""Rounds over a fleet: who is asked, what comes back, when a round ends and what it counts.

A schedule is a generator of Steps. It gives Jobs to the devices of a Fleet and takes their
Results, and knows neither how they travel (gRPC streams, Flower's Grid, a list in memory)
nor how updates are combined (federated/strategies.py).
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from federated.errors import BadReply, FederationError
from federated.updates import (
    MAX_EXAMPLES,
    NON_FINITE,
    Bounds,
    Scalar,
    Score,
    Update,
    Weights,
    is_finite,
    lower_median,
)

if TYPE_CHECKING:
    from federated.strategies import DeviceEvaluation, Strategy, Training

LOST = "the connection broke"
REVOKED = "it was revoked"
TEST_LOSS = "the new model's test loss is"
MAX_FAILURES = 3  # bad replies in a row; then a device is left out
AGAIN_SECONDS = 60.0  # until a service tries a round again that brought no new model
MAX_BROKEN = 10  # times that all connections may break in a round, at the cost of no attempt

# --- What travels between a schedule and a fleet --------------------------------------


@dataclass(eq=False)
class Device:
    """A connected board; a new object each time that it joins.

    Its state is in these fields and nowhere else. Only the Fleet's `start`, `abandon` and
    `wait` and the schedule write them, all in the thread that runs the schedule.
    """

    cid: str  # unique; "?1", "?2", … for clients that do not give their name
    properties: Mapping[str, Any] = field(default_factory=dict)  # what it reports of itself
    job: "Job | None" = None  # what it works on, while somebody waits for that
    late: bool = False  # it works on what nobody waits for any more
    failures: int = 0  # bad replies in a row
    gone: str = ""  # why its connection ended

    @property
    def name(self) -> str:
        """How people know it: "device 0", or "device ?" if it did not give its name."""
        return "device ?" if self.cid.startswith("?") else f"device {self.cid}"

    @property
    def left_out(self) -> bool:
        """Whether it has failed so often that it is not sampled until it reconnects."""
        return self.failures >= MAX_FAILURES

    @property
    def state(self) -> str:
        """One of gone, late, busy, left out, idle."""
        if self.gone:
            return "gone"
        if self.job or self.late:
            return "late" if self.late else "busy"
        return "left out" if self.left_out else "idle"


@dataclass(frozen=True, eq=False)
class Job:
    """What devices are asked to do: train from `model`, or evaluate it, on their own images."""

    id: str  # survives a broken connection: a device that comes back can offer its result
    version: int  # the round whose result `model` is
    model: Weights
    config: Mapping[str, Scalar]  # the settings, as they travel (federated/settings.py)
    kind: Literal["train", "evaluate"] = "train"


@dataclass(frozen=True)
class Joined:
    """A device connected."""

    device: Device


@dataclass(frozen=True)
class Left:
    """A device's connection ended; its job may still be finished when it is back."""

    device: Device
    reason: str = LOST


@dataclass(frozen=True)
class Resumed:
    """A device came back with a job that was lost with its connection."""

    device: Device
    job: Job


@dataclass(frozen=True)
class Began:
    """An attempt at a round begins: these devices get its job."""

    server_round: int
    devices: Sequence[Device]


@dataclass(frozen=True)
class Offered:
    """A device has trained; its update is fetched when there is room for it."""

    device: Device
    job: Job


@dataclass(frozen=True)
class Result:
    """How a job ended on a device."""

    device: Device
    job: Job
    update: Update | None  # checked
    problem: str = ""  # why there is neither an update nor a score
    at_fault: bool = False  # the device, not the network
    seconds: float = 0.0  # from sending the job to the device's being done
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds_sending: float = 0.0  # the first of `seconds`: until the job was with the device
    seconds_receiving: float = 0.0  # after `seconds`: while its update came
    score: Score | None = None  # of a job to evaluate; checked


@dataclass(frozen=True)
class Progress:
    """How far a device is with its training, a few times a minute: its own word."""

    device: Device
    step: int  # how many are done
    steps: int  # in all
    images_per_second: float
    metrics: Mapping[str, Scalar]  # the loss, and what the board measures of itself
    data_version: str = ""  # of what it would train on now; "" if it does not report that


@dataclass(frozen=True)
class Freed:
    """A device ended a job that nobody waited for any more."""

    device: Device


@dataclass(frozen=True)
class Notice:
    """Something for the operator, such as a device that was refused."""

    text: str
    kind: str = "notice"


@dataclass(frozen=True)
class Started:
    """A new run begins with these weights."""

    evaluation: Mapping[str, Any]  # of them on the server


@dataclass(frozen=True)
class Waiting:
    """There are too few idle devices for a round."""

    needed: int
    connected: int
    busy: int
    left_out: int


@dataclass(frozen=True)
class Dropped:
    """A device's work does not count in this round."""

    server_round: int
    device: Device
    reason: str


@dataclass(frozen=True)
class Clipped:
    """A device reports far more examples than is usual; they count in part."""

    server_round: int
    device: Device
    num_examples: int
    counted_examples: int


@dataclass(frozen=True)
class Retry:
    """An attempt brought no new model."""

    server_round: int
    attempt: int
    attempts: int
    good_replies: int
    reason: str = ""


Event = Joined | Left | Resumed | Progress | Offered | Result | Freed | Notice
Observed = Event | Started | Began | Waiting | Dropped | Clipped | Retry
Observer = Callable[["Observed | Step"], None]


class Fleet(ABC):
    """The devices that are connected, and the jobs that they work on.

    An implementation gives `_start`, `_abandon` and `_next`; the devices' state is kept here.
    All of it is called in one thread.
    """

    address = ""  # where devices reach it
    publication: Any = None  # the newest model, where devices can fetch it
    sign: Callable[[bytes], bytes] | None = None  # by the owner's authority, where there is one

    def __init__(self) -> None:
        self.devices: dict[str, Device] = {}
        self._awaited: dict[str, Job] = {}  # by cid, jobs whose Results are waited for

    def idle(self) -> list[Device]:
        """Return the devices that can be asked, by name, so that chance plays no part."""
        return [d for _, d in sorted(self.devices.items()) if d.state == "idle"]

    def start(self, device: Device, job: Job) -> None:
        """Give a job to an idle device. Returns at once; `wait` brings its Result."""
        device.job, device.late = job, False
        self._awaited[device.cid] = job
        self._start(device, job)

    def abandon(self, device: Device, job: Job, patience: float | None = None) -> None:
        """Wait no longer for a device's result; it is late until its job ends.

        Args:
            patience: seconds, then its connection is closed if it still works on the job.
        """
        if device.job is job:
            device.job, device.late = None, True  # a late job keeps no model in memory
        if self._awaited.get(device.cid) is job:
            del self._awaited[device.cid]
        self._abandon(device, job, patience)

    def wait(self, timeout: float | None = None) -> Event | None:
        """Return the next event, None when there was none for `timeout` seconds."""
        event = self._next(timeout)
        match event:
            case Joined(device):
                self.devices[device.cid] = device
            case Left(device, reason):
                device.gone, device.job = reason, None
                if self.devices.get(device.cid) is device:
                    del self.devices[device.cid]
            case Resumed(device, job):  # it may have come back just when it was given up
                if self._awaited.get(device.cid) is job:
                    device.job = job
                else:
                    device.late = True
            case Result(device, job):
                device.job, device.late = None, False
                if self._awaited.get(device.cid) is job:
                    del self._awaited[device.cid]
            case Freed(device):
                device.job, device.late = None, False
            case Progress(device, data_version=version) if version:
                device.properties = {**device.properties, "data_version": version}
        return event

    def revoked(self, devices: Sequence[Device]) -> list[Device]:
        """Return the devices whose admission the owner has taken back meanwhile."""
        return []

    def close(self, run_is_over: bool) -> None:  # noqa: B027 - a fleet may have nothing to close
        """Dismiss the devices: for good, or until the run continues."""

    @abstractmethod
    def _start(self, device: Device, job: Job) -> None: ...

    @abstractmethod
    def _abandon(self, device: Device, job: Job, patience: float | None) -> None: ...

    @abstractmethod
    def _next(self, timeout: float | None) -> Event | None: ...


EQUAL_EXAMPLES = 1000  # what each device counts as, where all count alike
OWN = Device("service")  # the server itself, where it trains, too


# --- Schedules ------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What must hold for a round to begin, to end and to count.

    Attributes:
        config: the settings of a round, by its number.
        job_id: a name for a round's work that no other run, and no other settings, share.
        evaluate: the new model's test results, "loss" among them.
        own: trains in each round on what the server itself has; returns the update and its weight.
        equal: each device counts as much as any other, however many examples it has.
        new_rounds: rounds for which a device's data count as new; a round begins when
            `min_num_clients` idle devices have new ones. 0: all of them always have.
        every: seconds from the beginning of one round to that of the next, at least.
        open_ended: a round without a new model is not the end, but is tried again later.
    """

    rounds: int
    config: Callable[[int], Mapping[str, Scalar]]
    evaluate: Callable[[Weights], Mapping[str, Any]]
    job_id: Callable[[int], str] = str
    first_round: int = 1
    min_num_clients: int = 1  # devices that must be connected
    min_sample_size: int = 1  # of these, devices that train
    min_replies: int = 1  # of these, devices whose updates are good
    timeout: float | None = None  # seconds, then a round closes without those that are not done
    retries: int = 0  # attempts after the first, when there are too few good updates
    seed: int = 0
    own: Callable[[int, Weights], tuple[Update, int]] | None = None
    equal: bool = False
    new_rounds: int = 0
    every: float = 0.0
    open_ended: bool = False


@dataclass(frozen=True)
class Contribution:
    """What is kept of an update that counts."""

    device: Device
    num_examples: int  # as the device reports
    counted_examples: int  # its weight in the mean, see Bounds
    norm: float
    metrics: Mapping[str, Scalar]
    seconds: float
    bytes_sent: int
    bytes_received: int
    seconds_sending: float = 0.0
    seconds_receiving: float = 0.0


@dataclass(frozen=True)
class DeviceScores:
    """What devices found of a round's new model."""

    metrics: Mapping[str, Scalar]  # what the strategy makes of all scores
    sampled: int  # devices that were asked
    scores: Sequence[tuple[Device, Score]]  # by the device's name
    seconds: float


@dataclass(frozen=True)
class Step:
    """A finished round: the new global weights and how they came about."""

    server_round: int
    weights: Weights
    evaluation: Mapping[str, Any]
    sampled: int  # devices that were asked
    contributions: Sequence[Contribution]  # by the device's name
    dropped: Sequence[tuple[str, str]]  # names and reasons, of all attempts
    seconds: float  # without waiting for devices and without evaluating
    seconds_evaluate: float  # on the server
    seconds_aggregate: float = 0.0  # of `seconds`
    device_scores: DeviceScores | None = None  # None if the strategy asked no device


def synchronous(
    fleet: Fleet,
    strategy: "Strategy",
    weights: Weights,
    plan: Plan,
    bounds: Bounds | None = None,
    observe: Observer = lambda event: None,
) -> Iterator[Step]:
    """Round by round: sample devices, wait for all of them, aggregate, evaluate.

    Devices evaluate the new model, too, if the strategy wants that.

    Raises:
        FederationError: a round has no new model after as many retries as the plan allows.
    """
    bounds, news = bounds or Bounds(), _News(plan.new_rounds)
    due = 0.0
    for server_round in range(plan.first_round, plan.rounds + 1):
        _handle_events(fleet, due - time.monotonic(), observe)
        news.wait(fleet, plan.min_num_clients, server_round, observe)
        due = time.monotonic() + plan.every
        this_round = _Round(server_round, fleet, strategy, weights, plan, bounds, observe)
        while (step := this_round.finish()) is None:  # a service goes on, with other devices maybe
            _handle_events(fleet, AGAIN_SECONDS, observe)
            this_round = _Round(server_round, fleet, strategy, weights, plan, bounds, observe)
        weights = step.weights
        news.add_round([contribution.device for contribution in step.contributions])
        yield replace(step, device_scores=this_round.evaluate_on_devices(weights))


def _handle_events(fleet: Fleet, seconds: float, observe: Observer) -> None:
    due = time.monotonic() + seconds
    while (left := due - time.monotonic()) > 0:
        if event := fleet.wait(left):
            observe(event)


class _News:
    """Which devices have something new to train on.

    A device may report of itself a "data_version", which changes with its data. They are new
    until it has trained on them in `rounds` rounds.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.trained: dict[tuple[str, Any], int] = {}  # rounds, by name and version of the data

    def has(self, device: Device) -> bool:
        version = device.properties.get("data_version")
        known = version is not None and self.rounds
        return not known or self.trained.get((device.cid, version), 0) < self.rounds

    def add_round(self, devices: Sequence[Device]) -> None:
        for device in devices:
            key = device.cid, device.properties.get("data_version")
            self.trained[key] = self.trained.pop(key, 0) + 1
        while len(self.trained) > 100_000:  # data that nobody has any more
            del self.trained[next(iter(self.trained))]

    def wait(self, fleet: Fleet, count: int, server_round: int, observe: Observer) -> None:
        """Handle events until `count` idle devices have something new."""
        shown = False
        while self.rounds:
            while event := fleet.wait(0):
                observe(event)
            idle = fleet.idle()
            new = sum(map(self.has, idle))
            # With too few devices there is a message on that already.
            if new >= count or len(idle) < count:
                return
            if not shown:
                text = f"round {server_round} begins when {count} device(s) have new data"
                observe(Notice(f"{text}; {new} of {len(idle)} have"))
            shown = True
            if event := fleet.wait():
                observe(event)


class NoModel(Exception):
    """An attempt brings no new model; the message gives the reason if it is not known already."""

    def __init__(self, reason: str = "", blameless: bool = False) -> None:
        super().__init__(reason)
        self.blameless = blameless  # nobody did anything wrong


class _Round:
    """One round, with as many attempts as it takes."""

    def __init__(
        self,
        server_round: int,
        fleet: Fleet,
        strategy: "Strategy",
        weights: Weights,
        plan: Plan,
        bounds: Bounds,
        observe: Observer,
    ) -> None:
        self.server_round = server_round
        self.fleet = fleet
        self.strategy = strategy
        self.weights = weights
        self.plan = plan
        self.bounds = bounds
        self.observe = observe
        self.avoided: set[str] = set()  # cids that this round samples only where others lack
        self.dropped: list[tuple[str, str]] = []
        self.excluded: set[str] = set()  # cids that it does not ask again
        self.counted: list[Contribution] = []
        self.sampled = 0
        self.broken = 0  # attempts in which all connections broke

    def finish(self) -> Step | None:
        """Make attempts until one has a new model; None if a service is to try again later.

        Raises:
            FederationError: there is none after as many retries as the plan allows.
        """
        attempts = self.plan.retries + 1
        attempt = diverges = 0
        while attempt < attempts:
            try:
                return self._attempt(attempt)
            except NoModel as problem:
                attempt += not problem.blameless
                if not problem.blameless:
                    good = len(self.counted)
                    self.observe(Retry(self.server_round, attempt, attempts, good, str(problem)))
                    diverges += self._diverges(str(problem))
        advice = "the reasons are above"
        if diverges == attempts:  # from the same weights and seed they would always do so
            advice = "training diverges"
            if lr := self.plan.config(self.server_round).get("lr"):
                advice += f"; start again with a --lr below this round's {lr:g}"
        ending = f"round {self.server_round} brought no new model in {attempts} attempts; {advice}"
        if not self.plan.open_ended:
            raise FederationError(ending)
        self.observe(Notice(f"{ending}; again in {AGAIN_SECONDS:g} s"))
        return None

    def _diverges(self, problem: str) -> bool:
        """Return whether numbers that grew too large are all that an attempt failed for."""
        reasons = [*self.reasons, problem] if problem else self.reasons
        return bool(reasons) and all(NON_FINITE in r or TEST_LOSS in r for r in reasons)

    def _attempt(self, attempt: int) -> Step:
        training = self._begin(attempt)
        start = time.perf_counter()  # waiting for devices does not count
        try:
            self._collect(training)
            self._check()
            if self.plan.own:  # not judged by the others: it is the server's
                try:
                    training.add(OWN, *self.plan.own(self.server_round, self.weights))
                except BadReply as error:  # of numbers that grew too large, say
                    raise NoModel(f"the server's own training: {error}") from None
            collected = time.perf_counter()
            weights = training.aggregate()
            if not is_finite(weights.values()) or not is_finite(self.strategy.state()[0].values()):
                raise NoModel(f"the new model has {NON_FINITE}")
            aggregated = time.perf_counter()
            evaluation = self.plan.evaluate(weights)
            if not evaluation["loss"] < float("inf"):
                raise NoModel(f"{TEST_LOSS} {evaluation['loss']}")
        except BaseException:
            training.roll_back()
            raise
        norms = [c.norm for c in self.counted]
        self.bounds.learn(norms, [c.counted_examples for c in self.counted])
        return Step(
            self.server_round,
            weights,
            evaluation,
            self.sampled,
            sorted(self.counted, key=lambda contribution: contribution.device.name),
            self.dropped,
            round(aggregated - start, 3),
            round(time.perf_counter() - aggregated, 3),
            round(aggregated - collected, 3),
        )

    def _begin(self, attempt: int) -> "Training":
        """Wait until there are enough devices, and choose among them."""
        more = 0  # devices that the strategy wants beyond what the plan asks for
        while True:
            self._wait_for_devices(more)
            idle = [d for d in self.fleet.idle() if d.cid not in self.excluded]
            if training := self._choose(idle, attempt):
                return training
            more = len(idle) + 1

    def _choose(self, idle: Sequence[Device], attempt: int) -> "Training | None":
        """Let the strategy sample; where others are idle, none that failed in this round."""

        def begin(devices: Sequence[Device], at_least: int = 0) -> "Training | None":
            return self.strategy.begin(
                self.server_round,
                self.weights,
                self.plan.config(self.server_round),
                devices,
                f"{self.plan.seed} {self.server_round} {attempt}",
                at_least,
            )

        training = begin(idle)
        failed = [device for device in idle if device.cid in self.avoided]
        if training is None or not failed:
            return training
        count = len(training.requests)  # as many as if nobody had failed
        training.roll_back()
        fresh = [device for device in idle if device.cid not in self.avoided]
        return begin([*fresh, *failed[: max(0, count - len(fresh))]], count)

    def _wait_for_devices(self, more: int) -> None:
        """Handle events until `min_num_clients` are connected and enough of them are idle.

        Devices that are left out are not waited for.
        """
        shown: Waiting | None = None
        while True:
            while event := self.fleet.wait(0):  # since the last round, or with its last result
                self.observe(event)
            devices = self.fleet.devices.values()
            states = [d.state for d in devices if d.cid not in self.excluded]
            able = len(states) - states.count("left out") - states.count("gone")
            needed = max(1, min(self.plan.min_sample_size, able), more)
            connected = sum(device.state != "gone" for device in devices)
            if connected >= self.plan.min_num_clients and states.count("idle") >= needed:
                return
            waiting = Waiting(
                max(self.plan.min_num_clients, more),
                connected,
                able - states.count("idle"),
                states.count("left out"),
            )
            if waiting != shown:
                self.observe(waiting)
            shown = waiting
            if event := self.fleet.wait():
                self.observe(event)

    def _collect(self, training: "Training") -> None:
        """Let devices train; take the updates until all are in or the round's time is over."""
        self.counted = []
        self.reasons: list[str] = []  # of this attempt's drops
        jobs = training.jobs(self.plan.job_id(self.server_round))
        self.sampled = len(jobs)
        limit = self.bounds.norm_limit(self.weights)
        declared = [device.properties.get("images") for device, _ in jobs]
        self.most_examples = self.bounds.examples_limit(n for n in declared if type(n) is int)

        def take(result: Result) -> None:
            self._take(result, training, limit)

        self.observe(Began(self.server_round, [device for device, _ in jobs]))
        self._gather(jobs, take, self._drop)

    def _gather(
        self,
        jobs: Sequence[tuple[Device, Job]],
        take: Callable[[Result], None],
        drop: Callable[[Device, str], None],
    ) -> None:
        """Give out jobs; pass on each Result, and name each device that brings none in time."""
        expected: dict[str, tuple[Device, Job]] = {}  # by cid; in the end it is empty
        lost: set[str] = set()  # of these, whose connection broke; they may come back
        # Of these, who have trained. The fleet drops a device that does not send its update in
        # time; how long that takes depends on the others as well.
        offered: set[str] = set()
        timeout = self.plan.timeout
        deadline = time.monotonic() + timeout if timeout else None
        for device, job in jobs:
            expected[device.cid] = (device, job)
            self.fleet.start(device, job)
        while expected.keys() - lost:
            event = self.fleet.wait(deadline and max(0.0, deadline - time.monotonic()))
            if event:
                self.observe(event)
            match event:
                case Result(device, job) if expected.get(device.cid, (None, None))[1] is job:
                    del expected[device.cid]
                    take(event)
                    del event  # before the next one comes: it holds a device's update
                case Left(device) if expected.get(device.cid, (None, None))[0] is device:
                    lost.add(device.cid)
                    offered.discard(device.cid)
                case Resumed(device, job) if expected.get(device.cid, (None, None))[1] is job:
                    expected[device.cid] = (device, job)
                    lost.discard(device.cid)
                case Offered(device) if device.cid in expected:
                    offered.add(device.cid)
            if deadline and time.monotonic() >= deadline:
                assert timeout
                for cid in [c for c in expected if c not in lost | offered]:
                    device, job = expected.pop(cid)
                    self.fleet.abandon(device, job, patience=timeout)
                    drop(device, f"no reply in {timeout:g} s")
                deadline = time.monotonic() + timeout  # for those that were lost and are back
        for device, job in expected.values():  # one may be coming back at this moment
            self.fleet.abandon(device, job, patience=timeout)
            drop(device, LOST)

    def _take(self, result: Result, training: "Training", limit: float) -> None:
        """Count a result, or drop it with the reason."""
        device, update, problem = result.device, result.update, result.problem
        at_fault = result.at_fault
        if update and (objection := self.strategy.objection_to(update)):
            problem, update, at_fault = objection, None, True
        if update and update.norm > limit:
            problem = (
                f"its update has norm {update.norm:.3g}, above the limit of {limit:.3g}; "
                "--max_update_norm sets another limit"
            )
            update, at_fault = None, True
        if update is None:
            device.failures += at_fault
            self._drop(device, problem)
            return
        counted = min(update.num_examples, self.most_examples)
        if counted < update.num_examples:
            self.observe(Clipped(self.server_round, device, update.num_examples, counted))
        training.add(device, update, EQUAL_EXAMPLES if self.plan.equal else counted)
        self.counted.append(
            Contribution(
                device,
                update.num_examples,
                counted,
                update.norm,
                update.metrics,
                result.seconds,
                result.bytes_sent,
                result.bytes_received,
                result.seconds_sending,
                result.seconds_receiving,
            )
        )

    def _drop(self, device: Device, reason: str) -> None:
        self.dropped.append((device.name, reason))
        self.reasons.append(reason)
        self.avoided.add(device.cid)
        self.observe(Dropped(self.server_round, device, reason))

    def _check(self) -> None:
        """Raise NoModel unless the updates that were added may become a model.

        They are in the sum already: when one must not count, the others are asked for again.
        """
        norms = {c.device.cid: c.norm for c in self.counted}
        outliers = self.bounds.outliers(norms, self.weights)
        for device in (c.device for c in self.counted):
            device.failures = device.failures + 1 if device.cid in outliers else 0
        if revoked := self.fleet.revoked([c.device for c in self.counted]):
            for device in revoked:
                self._drop(device, REVOKED)
                device.gone = REVOKED  # its connection is being cut
            raise NoModel(blameless=True)
        if not self.counted and self.reasons and set(self.reasons) <= {LOST, REVOKED}:
            self.broken += 1
            if self.broken <= MAX_BROKEN:
                raise NoModel(blameless=True)  # wait until they are back
            raise NoModel(f"all connections broke, {self.broken} times in this round")
        if len(self.counted) < self.plan.min_replies:
            raise NoModel()
        if outliers:
            for contribution in self.counted:
                device = contribution.device
                if device.cid in outliers:
                    self.excluded.add(device.cid)
                    self._drop(
                        device,
                        f"its update has norm {contribution.norm:.3g}, out of proportion to the "
                        f"others of this round",
                    )
            raise NoModel("the round is repeated without an update that is out of proportion")

    def evaluate_on_devices(self, weights: Weights) -> DeviceScores | None:
        """Let devices evaluate the new model. What goes wrong there costs the round nothing."""
        if not self.strategy.evaluates:
            return None
        start = time.perf_counter()
        scores: dict[Device, Score] = {}

        def drop(device: Device, reason: str) -> None:
            self._drop(device, f"evaluation: {reason}")

        def take(result: Result) -> None:
            if result.score:
                scores[result.device] = result.score
                return
            result.device.failures += result.at_fault
            drop(result.device, result.problem)

        evaluation = None
        try:
            evaluation = self._begin_evaluation(weights)
            jobs = evaluation.jobs(f"{self.plan.job_id(self.server_round)}-evaluate")
            if not jobs:
                return None
            self._gather(jobs, take, drop)
            usual = lower_median(score.num_examples for score in scores.values())
            most = int(min(self.bounds.max_weight_ratio * usual, MAX_EXAMPLES))
            metrics = evaluation.aggregate(
                {device: (score, min(score.num_examples, most)) for device, score in scores.items()}
            )
        except NoModel as problem:
            if evaluation:
                evaluation.roll_back()
            self.observe(Notice(f"round {self.server_round}: no evaluation by devices: {problem}"))
            return None
        ordered = sorted(scores.items(), key=lambda item: item[0].name)
        return DeviceScores(metrics, len(jobs), ordered, round(time.perf_counter() - start, 3))

    def _begin_evaluation(self, weights: Weights) -> "DeviceEvaluation":
        """Let the strategy choose among idle devices, once there are as many as it wants."""
        while True:
            idle = [d for d in self.fleet.idle() if d.cid not in self.excluded]
            if not idle:
                raise NoModel("no device is idle")
            evaluation = self.strategy.begin_evaluation(
                self.server_round,
                weights,
                self.plan.config(self.server_round),
                idle,
                f"{self.plan.seed} {self.server_round} evaluate",
            )
            if evaluation:
                return evaluation
            self._wait_for_devices(len(idle) + 1)

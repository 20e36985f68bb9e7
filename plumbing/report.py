"""What people see of a run on the console, a line each."""

import math
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from federated.rounds import (
    MAX_FAILURES,
    Clipped,
    Contribution,
    Device,
    DeviceScores,
    Dropped,
    Joined,
    Left,
    Notice,
    Observed,
    Retry,
    Started,
    Step,
    Waiting,
)
from federated.settings import OPEN_ENDED
from plumbing.board import MEGABYTES, TEMPERATURES, WATTS

MAX_LINES = 20  # devices a round with a line of their own; metrics.jsonl has all
LINES_AT_ONCE = 5  # on devices that come or go, in a period; the others are summed up
PERIOD_SECONDS = 1.0
SYNTHETIC = "synthetic images"


class Console:
    """An observer that prints what happens, a line each.

    Args:
        address: where devices reach the server.
        rounds: of the run.
        tested_on: kind of the test images; synthetic ones are named in every result.
        source: the SHA-256 of the server's code that trains; devices with another are named.
        code: in which files that is.
    """

    def __init__(
        self,
        address: str,
        rounds: int,
        tested_on: str,
        source: str | None = None,
        code: str = "utils.py",
    ) -> None:
        self.source = source
        self.code = code
        self.address = address
        self.rounds = rounds
        self.where = f" ({tested_on})" if tested_on == SYNTHETIC else ""
        self._lock = threading.Lock()
        self._here: set[str] = set()  # cids
        self._period: threading.Timer | None = None  # in which joins and departures are counted
        self._shown = 0  # of them, with a line each
        self._held: list[Joined | Left] = []  # the others
        self._waiting_held: Waiting | None = None

    def __call__(self, event: Observed | Step) -> None:
        with self._lock:
            if isinstance(event, Joined | Left):
                change = self._here.add if isinstance(event, Joined) else self._here.discard
                change(event.device.cid)
                if not self._period:
                    self._begin_period()
                if self._shown >= LINES_AT_ONCE:
                    self._held.append(event)
                    return
                self._shown += 1
            elif isinstance(event, Waiting) and self._held:
                self._waiting_held = event
                return
            else:
                self._print_held()
            self._print(self._lines(event))

    def _begin_period(self) -> None:
        self._shown = 0
        self._period = threading.Timer(PERIOD_SECONDS, self._end_period)
        self._period.daemon = True
        self._period.start()

    def _end_period(self) -> None:
        with self._lock:
            self._period = None
            self._print_held()

    def _print_held(self) -> None:
        """Print the joins and departures that have no line yet, those of many devices in one."""
        held, self._held = self._held, []
        for kind, verb in ((Joined, "joined"), (Left, "left")):
            events = [event for event in held if isinstance(event, kind)]
            last = {event.device.cid: event for event in events}  # some come and go repeatedly
            if len(last) < LINES_AT_ONCE:
                for event in last.values():
                    self._print(self._lines(event))
                continue
            self._print([f"{len(last)} devices {verb}: {listed(last)}"])
            if kind is Joined:
                others = [event.device for event in events if self._code(event.device)]
                self._print(self._code(others[0]) if others else [])
        if waiting := self._waiting_held:
            self._waiting_held = None
            self._print(self._lines(waiting))

    def _print(self, lines: Sequence[str]) -> None:
        for line in lines:
            print(line)

    def _lines(self, event: Observed | Step) -> list[str]:
        match event:
            case Joined(device):
                joined = f"{device.name} joined: {device_summary(device)}"
                return [shortened(joined, 299), *self._code(device)]
            case Left(device):
                return [f"{device.name} left"]
            case Notice(text):
                return [text]
            case Started(evaluation):
                loss, accuracy = evaluation["loss"], 100 * evaluation["accuracy"]
                return [f"before round 1  loss {loss:.3f}  accuracy {accuracy:.1f} %{self.where}"]
            case Waiting():
                return [self._waiting(event)]
            case Dropped(server_round, device, reason):
                lines = [f"round {server_round}: dropped {device.name}: {reason}"]
                if device.left_out:
                    lines.append(
                        f"round {server_round}: {device.name} is left out after {MAX_FAILURES} "
                        "bad replies in a row, until it reconnects"
                    )
                return lines
            case Clipped(server_round, device, num_examples, counted):
                return [
                    f"round {server_round}: {device.name} reports {num_examples:,} images, which "
                    f"count as {counted:,} (--max_weight_ratio)"
                ]
            case Retry(server_round, attempt, attempts, good, reason):
                return [
                    f"round {server_round}: no new model from {good} good replies, attempt "
                    f"{attempt} of {attempts}" + (f": {reason}" if reason else "")
                ]
            case Step():
                return self._step(event)
        return []

    def _code(self, device: Device) -> list[str]:
        """Return a warning if the device trains with other code than the server tests with."""
        theirs = device.properties.get("source", self.source)
        if theirs == self.source or not (theirs and self.source):
            return []
        return [
            f"warning: {device.name} trains with another {self.code} "
            f"(sha256:{str(theirs)[:12]}) than this server's (sha256:{self.source[:12]}); "
            "give both the same, unless that is meant"
        ]

    def _waiting(self, waiting: Waiting) -> str:
        shown = f"{waiting.connected} connected"
        shown += f", {waiting.busy} busy" if waiting.busy else ""
        shown += f", {waiting.left_out} left out" if waiting.left_out else ""
        shown += self._missing(waiting.needed)
        devices = "1 device" if waiting.needed == 1 else f"{waiting.needed} devices"
        return f"waiting for {devices} at {self.address} ({shown})"

    def _missing(self, needed: int) -> str:
        """Return the numbers of those that are not here, where devices have numbers as names."""
        numbers = {str(number) for number in range(needed)}
        if not self._here or not self._here < numbers:
            return ""
        return f"; missing: {listed(numbers - self._here)}"

    def _step(self, step: Step) -> list[str]:
        in_order = sorted(step.contributions, key=lambda c: natural(c.device.name))
        devices = [contribution_record(c) for c in in_order]
        width = max((len(device["name"]) for device in devices[:MAX_LINES]), default=0)
        of_all = "" if self.rounds >= OPEN_ENDED else f"/{self.rounds}"
        more = [f"  … and {len(devices) - MAX_LINES} more in metrics.jsonl"]
        return [
            f"round {step.server_round}{of_all}  devices {len(devices)}/{step.sampled}  "
            f"loss {step.evaluation['loss']:.3f}  accuracy "
            f"{100 * step.evaluation['accuracy']:.1f} %{self.where}  "
            f"{step.seconds + step.seconds_evaluate:.1f} s",
            *(device_line(device, width) for device in devices[:MAX_LINES]),
            *(more if len(devices) > MAX_LINES else []),
            *self._device_scores(step),
        ]

    def _device_scores(self, step: Step) -> list[str]:
        """Return a line with what the strategy makes of the devices' own test results."""
        if not (found := step.device_scores):
            return []
        cells = [f"tested on devices {len(found.scores)}/{found.sampled}"]
        loss, accuracy = (number(found.metrics, name) for name in ("loss", "accuracy"))
        cells += [f"loss {loss:.3f}"] if math.isfinite(loss) else []
        cells += [f"accuracy {100 * accuracy:.1f} %"] if 0 <= accuracy <= 1 else []
        cells.append(f"{found.seconds:.1f} s")
        return [f"round {step.server_round}/{self.rounds}  " + "  ".join(cells)]


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts "device 9" before "device 10"."""
    return [
        (int(part) if part.isascii() and part.isdigit() else -1, part)
        for part in re.split(r"([0-9]+)", name)
    ]


def listed(names: Collection[str], count: int = 10) -> str:
    """Return the first names in order, with dots for the rest."""
    return ", ".join(sorted(names, key=natural)[:count]) + ", …" * (len(names) > count)


def device_summary(device: Device) -> str:
    """Return in words what a device reported of itself."""
    reported = device.properties
    if "board" not in reported:
        return "a client that reports nothing of its board"
    images, data = reported.get("images"), reported.get("data")
    if not isinstance(data, str):
        data = f"{images:,} images" if isinstance(images, int) else "images not reported"
    board = ", ".join(str(reported.get(name)) for name in ("board", "machine"))
    software = f", {reported['software']}" if "software" in reported else ""
    return f"{board}, {reported.get('cores')} cores{software}, {reported.get('model')}, {data}"


def shortened(value: Any, length: int = 150) -> str:
    """Return the beginning of `value` as text: a hundred classes fill a screen."""
    text = str(value)
    return text if len(text) <= length else text[:length] + "…"


def contribution_record(contribution: Contribution) -> dict[str, Any]:
    """Return what metrics.jsonl has of a device in a round."""
    return {
        "name": contribution.device.name,
        "num_examples": contribution.num_examples,
        "counted_examples": contribution.counted_examples,
        "norm": contribution.norm,
        "seconds": round(contribution.seconds, 3),
        "seconds_sending": round(contribution.seconds_sending, 3),
        "seconds_receiving": round(contribution.seconds_receiving, 3),
        "bytes_sent": contribution.bytes_sent,
        "bytes_received": contribution.bytes_received,
        "metrics": dict(contribution.metrics),
    }


def scores_record(found: DeviceScores) -> dict[str, Any]:
    """Return what metrics.jsonl has of an evaluation by devices."""
    devices = [
        {
            "name": device.name,
            "num_examples": score.num_examples,
            "loss": score.loss,
            "metrics": dict(score.metrics),
        }
        for device, score in found.scores
    ]
    return {
        "metrics": dict(found.metrics),
        "sampled": found.sampled,
        "devices": devices,
        "seconds": found.seconds,
    }


def step_record(step: Step) -> dict[str, Any]:
    """Return a round's line in metrics.jsonl, without the test results."""
    return {
        "sampled": step.sampled,
        "devices": [contribution_record(c) for c in step.contributions],
        "dropped": [{"name": name, "reason": reason} for name, reason in step.dropped],
        "bytes_sent": sum(c.bytes_sent for c in step.contributions),
        "bytes_received": sum(c.bytes_received for c in step.contributions),
        "seconds": round(step.seconds + step.seconds_evaluate, 3),
        "seconds_evaluate": step.seconds_evaluate,
        "seconds_aggregate": step.seconds_aggregate,
        "device_scores": scores_record(step.device_scores) if step.device_scores else None,
    }


def print_classes(evaluation: Mapping[str, Any]) -> None:
    """Print loss and accuracy for each class."""
    width = max(12, *map(len, evaluation["class_loss"]))
    print(f"\n{'class':<{width}}  loss  accuracy")
    for name, loss in evaluation["class_loss"].items():
        print(f"{name:<{width}} {loss:5.2f}  {100 * evaluation['class_accuracy'][name]:6.1f} %")


def number(metrics: Mapping[str, Any], name: str) -> float:
    """Return a number of a round; NaN, which JSON cannot hold, where there is none."""
    value = metrics.get(name)
    return value if isinstance(value, int | float) else math.nan


def device_line(device: Mapping[str, Any], width: int = 10) -> str:
    """Return a line on what one device did in a round.

    Args:
        width: of the names' column.
        device: an entry of "devices" in metrics.jsonl. Its "metrics" are what the device claims:
            what is missing, of another type or absurd is left out.
    """
    metrics = device.get("metrics")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    cells = [f"{device.get('name', '')!s:<{width}}"]

    def add(value: Any, limits: tuple[float, float], cell: str, scale: float = 1) -> None:
        if type(value) in (int, float) and limits[0] <= value <= limits[1]:
            cells.append(cell.format(value / scale))

    add(device.get("num_examples"), (0, 1e9), "{:7,.0f} images")
    add(device.get("seconds"), (0, 1e7), "{:6.1f} s")
    add(metrics.get("images_per_second"), (0, 1e7), "{:6,.0f} images/s")
    add(metrics.get("peak_ram_mb"), MEGABYTES, "{:5,.0f} MB RAM")
    add(metrics.get("cpu_temperature"), TEMPERATURES, "{:3.0f} °C")
    add(metrics.get("gpu_temperature"), TEMPERATURES, "GPU {:3.0f} °C")
    add(metrics.get("power_watts"), WATTS, "{:5.1f} W")
    add(device.get("bytes_sent"), (0, 1e12), "{:6.2f} MB down", 1e6)
    add(device.get("bytes_received"), (0, 1e12), "{:6.2f} MB up", 1e6)
    for key, cell in (("throttled", "{}"), ("throttled_since_boot", "earlier: {}")):
        if isinstance(names := metrics.get(key), str) and names:
            cells.append(cell.format(names[:60]))
            break
    return "  " + "  ".join(cells)

"""What the page shows of a run: built from a run's events as they come, or from its files.

The schedule's thread writes, the web server's reads. Whatever changes gets the next version
number, so that a browser which was away, or reads slowly, gets exactly what it lacks.
"""

import itertools
import json
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from federated.rounds import (
    Began,
    Device,
    Joined,
    Observed,
    Offered,
    Progress,
    Result,
    Step,
    Waiting,
)
from plumbing.board import MEGABYTES, TEMPERATURES, WATTS
from plumbing.report import number, step_record
from plumbing.runs import MAX_TEXT, NO_JSON, event_record, objection_to_round, utc_now
from plumbing.security.complaints import REFUSED, bounded

MAX_EVENTS = 1000  # that are kept; events.jsonl has all
MAX_STRANGERS = 200  # rows of devices that never joined
PARTS = ("sending", "training", "receiving", "aggregating", "evaluating", "other")
Record = Mapping[str, Any]  # from a line of metrics.jsonl or events.jsonl
BOARD = ("board", "machine", "cores", "device", "images", "data")


class RunState:
    """An observer; also fed with the lines of a run's files.

    Args:
        config: as in config.json.
    """

    def __init__(self, config: Mapping[str, Any], name: str = "", address: str = "") -> None:
        self.config = config
        self.name = name
        self.address = address
        self.lock = threading.Lock()
        self.version = 0
        self.status: dict[str, Any] = {"phase": "starting", "round": 0, "version": 0}
        self.rounds: list[dict[str, Any]] = []
        self.events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self.rows: OrderedDict[str, dict[str, Any]] = OrderedDict()  # the last changed at the end
        self._devices: dict[str, Device] = {}
        self._working: set[str] = set()  # cids whose results this round waits for

    # --- What happens ---

    def __call__(self, event: Observed | Step) -> None:
        with self.lock:
            match event:
                case Began(server_round, devices):
                    self._working = {device.cid for device in devices}
                    self._set_status("training", round=server_round, sampled=len(devices), done=0)
                    for device in devices:
                        self._touch(device, "training", step=0, steps=0)
                case Progress(device, step, steps, rate, metrics):
                    measured = checked_metrics({**metrics, "images_per_second": rate or None})
                    self._touch(device, step=step, steps=steps, **measured)
                case Offered(device) | Result(device):
                    self._touch(device, "done")
                    self._count_down(device)
                case Waiting(needed, connected):
                    self._set_status("waiting", needed=needed, connected=connected)
                case Step():
                    row = {"server_round": event.server_round, **event.evaluation}
                    self._add_round({**row, **step_record(event), "time": utc_now()})
                    for contribution in event.contributions:
                        self._touch(contribution.device)
                    self._set_status("between rounds")
                case _:
                    if isinstance(event, Joined):
                        self._devices[event.device.cid] = event.device
                    if record := event_record(event):
                        self._add_event({**record, "time": utc_now()})

    def finish(self, phase: str) -> None:
        """Note that the run has ended: "finished", "interrupted" or "stopped"."""
        with self.lock:
            self._set_status(phase)

    def replay(self, rounds: Iterable[Record], events: Iterable[Record]) -> None:
        """Take the lines of metrics.jsonl and events.jsonl."""
        with self.lock:
            for event in events:
                self._add_event(event)
            for row in rounds:
                self._add_round(row)
            for row in self.rows.values():
                if row["state"] != "refused":
                    row["state"] = "gone"

    def _count_down(self, device: Device) -> None:
        """Note that a device of this round is done."""
        if device.cid in self._working:
            self._working.discard(device.cid)
            left = len(self._working)
            phase = "training" if left else "aggregating and testing"
            self._set_status(phase, done=self.status.get("sampled", 0) - left)

    def _next(self) -> int:
        self.version += 1
        return self.version

    def _set_status(self, phase: str, **fields: Any) -> None:
        began = self.status.get("began")
        if phase != self.status["phase"]:
            began = utc_now()
        self.status = {**self.status, **fields, "phase": phase, "began": began}
        self.status["version"] = self._next()

    def _touch(self, device: Device, state: str = "", **fields: Any) -> None:
        """Note what is new of a connected device."""
        state = state or device.state
        row = self._row(device.cid)
        row.update(fields, state="training" if state == "busy" else state, seen=utc_now())

    def _row(self, cid: str) -> dict[str, Any]:
        """Return a device's row, as changed now."""
        row = self.rows.get(cid)
        if row is None:
            row = {"cid": cid, "state": "idle", "sent": 0, "received": 0, "dropped": 0}
            self.rows[cid] = row
        self.rows.move_to_end(cid)
        row["version"] = self._next()
        return row

    def _add_round(self, row: Mapping[str, Any]) -> None:
        self.rounds.append({**round_summary(row), "version": self._next()})
        for device in row.get("devices", []):
            cid = cid_of(device["name"])
            mine = self._row(cid)
            metrics = device.get("metrics")
            mine.update(checked_metrics(metrics if isinstance(metrics, Mapping) else {}))
            mine["seconds"] = number(device, "seconds")
            for ours, name in (("sent", "bytes_sent"), ("received", "bytes_received")):
                mine[ours] += count(device.get(name))
            mine["seen"] = text(row.get("time"))
        self.status = {**self.status, "round": row["server_round"], "version": self._next()}

    def _add_event(self, record: Mapping[str, Any]) -> None:
        """Note an event as events.jsonl has it: in the list, and in its device's row."""
        kind, cid, reason = (text(record.get(name)) for name in ("event", "cid", "reason"))
        when = text(record.get("time"))
        if kind == "notice" and (refused := REFUSED.match(text(record.get("text")))):
            kind, cid, reason = "refused", bounded(refused[1], 64), bounded(refused[2])
        self.events.append(
            {
                "kind": kind,
                "cid": cid,
                "time": when,
                "text": text(event_text(kind, reason, record)),
                "version": self._next(),
            }
        )
        if not cid:
            return
        if kind == "refused" and not self._may_show_stranger(cid):
            return
        row = self._row(cid)
        row["seen"] = when
        device = self._devices.get(cid)
        if kind == "joined":
            row.update({name: text(record[name])[:80] for name in BOARD if name in record})
            row["images"] = count(record.get("images"))
            row.update(state="idle", why="", step=0, steps=0)
        elif kind == "left":
            row.update(state="gone", why=reason)
        elif kind == "refused" and (not device or device.gone):
            row.update(state="refused", why=reason)
        elif kind == "dropped":
            row.update(why=reason, dropped=row["dropped"] + 1)
            if device:
                row["state"] = "training" if device.state == "busy" else device.state

    def _may_show_stranger(self, cid: str) -> bool:
        strangers = sum(row["state"] == "refused" for row in self.rows.values())
        return cid in self.rows or strangers < MAX_STRANGERS

    # --- What a browser gets ---

    def since(self, version: int) -> dict[str, Any] | None:
        """Return what is newer than `version`, None if nothing is; 0 gets everything."""
        with self.lock:
            if version >= self.version:
                return None
            newer = itertools.takewhile(
                lambda row: row["version"] > version, reversed(self.rows.values())
            )
            news: dict[str, Any] = {
                "version": self.version,
                "status": self.status,
                "rounds": [row for row in self.rounds if row["version"] > version],
                "events": [event for event in self.events if event["version"] > version],
                "devices": [dict(row) for row in newer],
            }
            if version == 0:
                news["config"], news["name"] = dict(self.config), self.name
                news["address"] = self.address
            return news


# --- What is in a row -----------------------------------------------------------------


def cid_of(name: str) -> str:
    return name.removeprefix("device ")


def text(value: Any) -> str:
    """Return a value from a device or a file as one printable line of bounded length."""
    return "" if value is None else bounded(str(value)[:MAX_TEXT], MAX_TEXT)


def count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def checked_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a device's metrics what can be: they are its own word."""
    found: dict[str, Any] = {}

    def add(name: str, source: str, low: float, high: float, digits: int = 1) -> None:
        value: Any = metrics.get(source)
        if type(value) in (int, float) and low <= value <= high:
            found[name] = round(value, digits)

    add("loss", "loss", -1e9, 1e9, 4)
    add("rate", "images_per_second", 0, 1e9)
    add("cpu", "cpu_temperature", *TEMPERATURES)
    add("gpu", "gpu_temperature", *TEMPERATURES)
    add("ram", "peak_ram_mb", *MEGABYTES)
    add("free", "free_ram_mb", *MEGABYTES)
    add("watts", "power_watts", *WATTS)
    for name in ("throttled", "throttled_since_boot"):
        if isinstance(value := metrics.get(name), str):
            found[name] = text(value)[:80]
    return found


def round_summary(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a line of metrics.jsonl what the charts show."""
    classes = row.get("class_accuracy")
    classes = classes if isinstance(classes, Mapping) else {}
    return {
        "round": row["server_round"],
        "time": text(row.get("time")),
        "loss": finite(number(row, "loss")),
        "accuracy": finite(number(row, "accuracy")),
        "classes": {text(name)[:40]: finite(number(classes, name)) for name in list(classes)[:200]},
        "seconds": finite(number(row, "seconds")) or 0.0,
        "parts": parts_of(row),
        "sent": count(row.get("bytes_sent")),
        "received": count(row.get("bytes_received")),
        "counted": len(row.get("devices", [])),
        "sampled": count(row.get("sampled")),
        "dropped": len(dropped_in(row)),
    }


def dropped_in(row: Record) -> list[Record]:
    dropped = row.get("dropped")
    dropped = dropped if isinstance(dropped, list) else []
    return [item for item in dropped if isinstance(item, Mapping)]


def parts_of(row: Mapping[str, Any]) -> list[float]:
    """Return a round's seconds as PARTS; the devices' are those of the one that took longest."""

    def whole(device: Record) -> float:
        return number(device, "seconds") + (finite(number(device, "seconds_receiving")) or 0.0)

    slowest: Record = max(row.get("devices", []), key=whole, default={})
    sending, receiving = (
        finite(number(slowest, f"seconds_{part}")) or 0.0 for part in ("sending", "receiving")
    )
    training = max(0.0, (finite(number(slowest, "seconds")) or 0.0) - sending)
    aggregating, evaluating = (
        finite(number(row, f"seconds_{part}")) or 0.0 for part in ("aggregate", "evaluate")
    )
    known = [sending, training, receiving, aggregating, evaluating]
    other = max(0.0, (finite(number(row, "seconds")) or 0.0) - sum(known))
    return [round(part, 3) for part in [*known, other]]


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def event_text(kind: str, reason: str, record: Mapping[str, Any]) -> str:
    """Return an event in words, without its device's name."""
    server_round = record.get("server_round")
    where = f"round {server_round}: " if type(server_round) is int else ""
    match kind:
        case "joined":
            shown = [text(record.get(name)) for name in ("board", "machine", "data")]
            return "joined: " + ", ".join(filter(None, shown))
        case "started":
            match record.get("accuracy"):
                case float() as accuracy if 0 <= accuracy <= 1:
                    return f"a new run; accuracy {100 * accuracy:.1f} % before it"
            return "a new run"
        case "left":
            return f"left: {reason}"
        case "resumed":
            return "came back with work that was lost with its connection"
        case "dropped":
            return f"{where}dropped: {reason}"
        case "refused":
            return f"refused: {reason}"
        case "clipped":
            return (
                f"{where}reports {count(record.get('num_examples')):,} images, which count as "
                f"{count(record.get('counted_examples')):,}"
            )
        case "retry":
            tried = f"attempt {count(record.get('attempt'))} of {count(record.get('attempts'))}"
            return f"{where}no new model, {tried}" + (f": {reason}" if reason else "")
    return text(record.get("text"))


# --- Runs on the disk -----------------------------------------------------------------


def read_lines(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines, the last `most`; what is none is left out."""
    found: deque[dict[str, Any]] = deque(maxlen=most)
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except NO_JSON:
                    continue
                if isinstance(record, dict):
                    found.append(record)
    except OSError:
        return []
    return list(found)


def read_rounds(directory: Path) -> list[dict[str, Any]]:
    """Return the rounds of a run, without lines that are no record of one."""
    rows = read_lines(directory / "metrics.jsonl")
    return [row for row in rows if objection_to_round(row) is None]


def read_config(directory: Path) -> dict[str, Any]:
    """Return a run's settings, {} without."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, *NO_JSON):
        return {}
    return config if isinstance(config, dict) else {}


def read_run(directory: Path) -> RunState:
    """Return a run as its files have it."""
    state = RunState(shown_config(read_config(directory)), directory.name)
    state.replay(read_rounds(directory), read_lines(directory / "events.jsonl", MAX_EVENTS))
    state.finish("finished" if (directory / "model.safetensors").exists() else "not running")
    return state


def shown_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the page may show: no secret is among them, and all are short."""
    shown: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, bool | int | float) or value is None:
            shown[text(name)[:80]] = value
        elif isinstance(value, list):
            shown[text(name)[:80]] = text(", ".join(map(str, value[:200])))
        else:
            shown[text(name)[:80]] = text(value)
    return shown


def device_curves(rounds: Iterable[Mapping[str, Any]], cid: str) -> list[dict[str, Any]]:
    """Return a device's row of each round that it counted or was dropped in."""
    found = []
    for row in rounds:
        for device in row.get("devices", []):
            if cid_of(device["name"]) == cid:
                metrics = device.get("metrics")
                measured = checked_metrics(metrics if isinstance(metrics, Mapping) else {})
                seconds = finite(number(device, "seconds"))
                images = count(device.get("num_examples"))
                found.append(
                    {"round": row["server_round"], "seconds": seconds, "images": images, **measured}
                )
        for dropped in dropped_in(row):
            if cid_of(str(dropped.get("name"))) == cid:
                reason = text(dropped.get("reason"))
                found.append({"round": row["server_round"], "dropped": reason})
    return found

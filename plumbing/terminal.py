"""A live block below the log, on a terminal: the round, and how far each device is.

In a file or a pipe there is none: then the lines of plumbing/report.py are all.
"""

import io
import logging
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from federated.rounds import (
    Began,
    Device,
    Fleet,
    Observed,
    Observer,
    Offered,
    Progress,
    Result,
    Step,
    Waiting,
)
from plumbing.board import TEMPERATURES
from plumbing.report import natural
from plumbing.runs import RunDirectory

MAX_BARS = 20  # devices with a bar of their own; of more, counts and the slowest five
SLOWEST = 5
PER_SECOND = 4  # the block is drawn
REMEMBERED = 5  # rounds, by whose usual length the end of the run is estimated


class Block:
    """An observer that keeps the block; `close` removes it."""

    def __init__(self, console: Console, rounds: int, batch_size: int) -> None:
        self.console = console
        self.rounds = rounds
        self.batch_size = batch_size
        self.lock = threading.Lock()
        self.title = "starting"
        self.began = time.monotonic()
        self.finished = 0  # rounds
        self.lengths: list[float] = []  # of the last rounds, in seconds
        self.devices: list[Device] = []  # of this round
        self.done: set[str] = set()
        self.reports: dict[str, tuple[Progress, float]] = {}  # with the time, by cid
        self.rates: dict[str, float] = {}  # images a second, by cid, also of earlier rounds
        self.live = Live(
            console=console,
            get_renderable=self.draw,
            refresh_per_second=PER_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.live.start()
        self._streams = [(name, getattr(sys, name)) for name in ("stdout", "stderr")]
        self._divert()

    def _divert(self) -> None:
        """Let what is printed appear above the block, whole, and in the log file as ever."""
        for name, stream in self._streams:
            if hasattr(stream, "log"):  # cli.log_to's, which must not log the block
                stream.stream = Above(stream.stream, self.console)
            elif stream.isatty():
                setattr(sys, name, Above(stream, self.console))
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stdout)

    def close(self) -> None:
        if not self.live.is_started:
            return
        self.live.stop()
        for name, stream in self._streams:
            if hasattr(stream, "log") and isinstance(stream.stream, Above):
                stream.stream = stream.stream.stream
            setattr(sys, name, stream)

    def __call__(self, event: Observed | Step) -> None:
        with self.lock:
            match event:
                case Began(server_round, devices):
                    self.title = f"round {server_round}/{self.rounds}"
                    self.devices = sorted(devices, key=lambda device: natural(device.name))
                    self.began = time.monotonic()
                    self.done.clear()
                    self.reports.clear()
                case Waiting(needed, connected):
                    self.title = f"waiting for {needed} devices, {connected} connected"
                    self.devices = []
                case Progress(device):
                    self.reports[device.cid] = event, time.monotonic()
                    if event.images_per_second:
                        self.rates[device.cid] = event.images_per_second
                case Offered(device) | Result(device):
                    self.done.add(device.cid)
                case Step():
                    self.finished = event.server_round
                    length = event.seconds + event.seconds_evaluate
                    self.lengths = [*self.lengths, length][-REMEMBERED:]
                    self.devices = []
        if isinstance(event, Step) and event.server_round >= self.rounds:
            self.close()

    # --- What it looks like ---

    def draw(self) -> RenderableType:
        with self.lock:
            shares = {device.cid: self._share(device) for device in self.devices}
            rows: list[RenderableType] = [self._whole(shares)]
            if len(self.devices) > MAX_BARS:
                rows.append(Text(self._counts(), style="dim"))
            slowest = sorted(self.devices, key=lambda device: shares[device.cid])[:SLOWEST]
            shown = self.devices if len(self.devices) <= MAX_BARS else slowest
            rows.append(self._bars(shown, shares))
            return Group(*rows)

    def _whole(self, shares: dict[str, float]) -> RenderableType:
        share = sum(shares.values()) / len(shares) if shares else 0.0
        words = f"{100 * share:3.0f} %" if shares else ""
        if shares:
            words += f"   {len(self.done)} of {len(shares)} devices done"
        if left := self._left(share):
            words += f"   about {duration(left)} left"
        row = Table.grid(padding=(0, 2))
        row.add_row(Text(self.title, style="bold"), bar(share, 30) if shares else "", words)
        return row

    def _bars(self, devices: Sequence[Device], shares: dict[str, float]) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for device in devices:
            share = shares[device.cid]
            cells = self._cells(device)
            table.add_row(f"  {device.name}", bar(share, 20), f"{100 * share:3.0f} %", *cells)
        return table

    def _cells(self, device: Device) -> list[str]:
        """Return what a device reported last: its rate, loss, heat and throttling."""
        if device.cid in self.done:
            return ["trained"]
        if device.gone:
            return ["gone"]
        report, _ = self.reports.get(device.cid, (None, 0.0))
        if not report:
            return [""]
        rate = self.rates.get(device.cid)
        cells = [f"{rate:,.0f} images/s" if rate else ""]
        loss: Any = report.metrics.get("loss")
        cells.append(f"loss {loss:.3f}" if isinstance(loss, float) and abs(loss) < 1e6 else "")
        celsius: Any = report.metrics.get("cpu_temperature")
        low, high = TEMPERATURES
        warm = isinstance(celsius, float) and low <= celsius <= high
        cells.append(f"{celsius:.0f} °C" if warm else "")
        throttled = report.metrics.get("throttled")
        cells.append(throttled[:40] if isinstance(throttled, str) else "")
        return cells

    def _share(self, device: Device) -> float:
        """Return how much of its work a device has done, carried on from its last report."""
        if device.cid in self.done:
            return 1.0
        report, when = self.reports.get(device.cid, (None, 0.0))
        if not report or not report.steps:
            return 0.0
        rate = self.rates.get(device.cid, 0.0)
        since = (time.monotonic() - when) * rate / self.batch_size
        return min((report.step + since) / report.steps, 0.99)

    def _counts(self) -> str:
        gone = sum(bool(device.gone) for device in self.devices)
        training = len(self.devices) - len(self.done) - gone
        words = f"  {training} training, {len(self.done)} trained"
        return words + (f", {gone} gone" if gone else "") + f"; the slowest {SLOWEST}:"

    def _left(self, share: float) -> float:
        """Return the seconds until the run ends, 0 if nobody can know yet."""
        spent = time.monotonic() - self.began
        usual = sorted(self.lengths)[len(self.lengths) // 2] if self.lengths else 0.0
        if not usual and share > 0.05:
            usual = spent / share
        rest = max(usual - spent, 0.0) if self.devices else usual
        return rest + usual * max(self.rounds - self.finished - 1, 0) if usual else 0.0


class Above(io.TextIOBase):
    """A stream whose lines appear above the block, not wrapped: a token stays one word."""

    def __init__(self, stream: Any, console: Console) -> None:
        self.stream = stream
        self.console = console
        self.line = ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self.console.print(Text(line), soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return True


def bar(share: float, width: int) -> ProgressBar:
    return ProgressBar(total=1.0, completed=share, width=width)


def duration(seconds: float) -> str:
    """Return seconds as they are written: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class LiveBlock:
    """The block of a run, if there is a terminal for it."""

    def __init__(self) -> None:
        self.block: Block | None = None

    def open(self, fleet: Fleet, directory: RunDirectory) -> Sequence[Observer]:
        """Return the observer that keeps the block; none without a terminal."""
        out = getattr(sys.stdout, "stream", sys.stdout)
        console = Console(file=out, highlight=False)
        if not console.is_terminal or console.is_dumb_terminal:
            return ()
        rounds, batch_size = directory.config["rounds"], directory.config["batch_size"]
        self.block = Block(console, rounds, batch_size)
        return (self.block,)

    def __enter__(self) -> "LiveBlock":
        return self

    def __exit__(self, *_: object) -> None:
        if self.block:
            self.block.close()

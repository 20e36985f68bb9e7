"""Lines on refused peers: short enough to read, and few however many peers there are."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable

LINE_LENGTH = 300
PERIOD_SECONDS = 10.0  # refusals are summed up after so long
FIRST_LINES = 3  # of one peer are reported at once
PERIOD_LINES = 10  # reported at once in a period, and as many sums at its end; the rest is counted
# A line on a refusal, as `Refusals` makes it: whose, and why.
REFUSED = re.compile(r"refused (?:device )?([^ ]{1,80})(?: [\d,]+ times more)?: (.*)")
KINDS = 1000  # pairs of peer and reason that are counted apart in a period


def bounded(line: str, length: int = LINE_LENGTH) -> str:
    """Return `line`, which may quote a peer, as one printable line of at most `length`."""
    cut = line[: length - 1] + "…" if len(line) > length else line
    return "".join(c if c.isprintable() else "?" for c in cut)


class Refusals:
    """Reports who was refused and why: the first few at once, then the number of each.

    Any thread may add refusals. The sums come from a thread of this class.

    Args:
        report: called with a line for the owner.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None  # runs while a period does
        self._reported: Counter[str] = Counter()  # lines in this period, by peer
        self._counted: Counter[tuple[str, str]] = Counter()  # not reported yet, by peer and reason
        self._others = 0  # not reported yet, and too many kinds to count apart

    def add(self, peer: str, reason: str) -> None:
        """Note that `peer`, an address or a device's name, was refused."""
        peer, reason = bounded(peer, 80), bounded(reason)
        with self._lock:
            at_once = (
                self._reported[peer] < FIRST_LINES and sum(self._reported.values()) < PERIOD_LINES
            )
            if at_once:
                self._reported[peer] += 1
            elif (peer, reason) in self._counted or len(self._counted) < KINDS:
                self._counted[peer, reason] += 1
            else:
                self._others += 1
            if not self._timer:
                self._start_period()
        if at_once:
            self.report(bounded(f"refused {peer}: {reason}"))

    def close(self) -> None:
        """Report what has been counted so far."""
        with self._lock:
            if self._timer:
                self._timer.cancel()
            lines = self._sums()
        for line in lines:
            self.report(line)

    def _start_period(self) -> None:
        self._timer = threading.Timer(PERIOD_SECONDS, self._end_period)
        self._timer.daemon = True
        self._timer.start()

    def _end_period(self) -> None:
        with self._lock:
            # A peer that continues is only counted from now on.
            self._reported = Counter({peer: FIRST_LINES for peer, _ in self._counted})
            self._timer = None
            lines = self._sums()
            if lines:
                self._start_period()
        for line in lines:
            self.report(line)

    def _sums(self) -> list[str]:
        lines = []
        for (peer, reason), times in self._counted.most_common(PERIOD_LINES):
            number = f" {times:,} times more" if times > 1 else ""
            lines.append(bounded(f"refused {peer}{number}: {reason}"))
            del self._counted[peer, reason]
        if others := sum(self._counted.values()) + self._others:
            lines.append(f"refused others {others:,} times, for similar reasons")
        self._counted.clear()
        self._others = 0
        return lines

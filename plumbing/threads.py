"""How many processor threads PyTorch gets: a number, or the fastest one.

More threads are not always faster. Those of one process wait for each other by spinning: beside
another busy process, two on two cores reach a fraction of what one reaches.
"""

from __future__ import annotations

import time
from typing import Callable

import torch

TRIAL_SECONDS = 0.2
SWEEPS = 3  # over all numbers: what else runs on the machine comes and goes
USELESS = 0.6  # of the best rate so far: more threads than that are not tried
CLEARLY = 1.05  # times the rate of fewer threads, to be chosen
WINDOW_SECONDS = 2.0  # over which the rate is watched
SLOWED = 0.5  # of the rate that was usual
LOOK_SHARE = 0.05  # of the time goes into looking again, at most

# Works for about that many seconds, on copies, and returns a rate: steps or images a second.
Trial = Callable[[float], float]


class Threads:
    """The number of threads of this process.

    The last bits of the weights depend on it. So what "auto" has chosen stays until the rate
    halves.

    Args:
        wanted: a number, or "auto".
    """

    def __init__(self, wanted: str) -> None:
        most = torch.get_num_threads()  # one a core, or $OMP_NUM_THREADS
        self.numbers = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if n < most] + [most]
        self.auto = wanted == "auto"
        self.count = 0  # until one is chosen
        self.rate = 0.0
        self.done, self.seconds = 0, 0.0  # in the window
        self.next_look = 0.0
        if not self.auto:
            self.set(int(wanted))

    def set(self, count: int, rate: float = 0.0) -> None:
        """Use `count` threads, which do `rate` steps or images a second."""
        torch.set_num_threads(count)
        self.count, self.rate = count, rate

    def choose(self, trial: Trial) -> str:
        """Use the fastest number; return how fast each was."""
        began = time.perf_counter()
        rates = dict.fromkeys(self.numbers, 0.0)
        for _ in range(SWEEPS):
            best = 0.0
            for count in list(rates):
                torch.set_num_threads(count)
                rate = trial(TRIAL_SECONDS)
                rates[count] += rate / SWEEPS
                best = max(best, rate)
                if rate < USELESS * best:
                    rates = {tried: rates[tried] for tried in rates if tried <= count}
                    break
        fastest = 1
        for count, rate in rates.items():
            if rate > CLEARLY * rates[fastest]:
                fastest = count
        self.set(fastest, rates[fastest])
        now = time.perf_counter()
        self.next_look = now + (now - began) / LOOK_SHARE
        return ", ".join(f"{count}: {rate:,.0f}" for count, rate in rates.items())

    def watch(self, done: int, seconds: float, trial: Trial) -> str:
        """Choose again if the rate has halved; return what to report of that, or "".

        Args:
            done: how many more steps or images are done.
            seconds: how long they took.
        """
        self.done, self.seconds = self.done + done, self.seconds + seconds
        if not (self.auto and self.count) or self.seconds < WINDOW_SECONDS:
            return ""
        rate, usual, before = self.done / self.seconds, self.rate, self.count
        self.done, self.seconds = 0, 0.0
        if rate >= SLOWED * usual or time.perf_counter() < self.next_look:
            self.rate = max(rate, usual)
            return ""
        rates = self.choose(trial)
        if self.count == before:
            return ""
        return (
            f"{_threads(self.count)} from here on, not {before}: the rate fell from {usual:,.0f} "
            f"to {rate:,.0f} a second ({rates}). Another run will differ in the last bits"
        )


def _threads(count: int) -> str:
    return f"{count} processor thread{'s' * (count > 1)}"

"""report.png: a run in one picture, for a talk or a wall."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from federated.errors import FederationError
from plumbing.report import natural, number, shortened

Rounds = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, which the colour-blind can tell apart, too.
BLUE, ORANGE, GREEN, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00"
INK, PALE = "#16202A", "#E2E6EB"
PARTS = {"sending": SKY, "training": BLUE, "receiving": GREEN}
MAX_BARS = 49  # devices with a bar of their own; more are shown as quantiles
MAX_CLASSES = 20  # of more, the lowest and the highest
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": "#566472",
    "ytick.color": "#566472",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def draw_report(path: Path, title: str, rounds: Rounds, start: float | None = None) -> None:
    """Draw accuracy, loss, accuracy by class, and seconds by device.

    Args:
        title: what was trained, how, on what.
        rounds: the lines of metrics.jsonl; without any there is nothing to draw.
        start: the test accuracy before round 1; None where it is not known.

    Raises:
        FederationError: the picture cannot be written.
    """
    if not rounds:
        return
    # Here: it takes half a second that a run can do without.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(12, 7), facecolor="white")
        figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12, wspace=0.04, hspace=0.05)
        date = str(rounds[-1].get("time", ""))[:10]
        figure.suptitle(
            "  ·  ".join(filter(None, [shortened(title, 110), date])),
            x=0.015, ha="left", fontsize=14, fontweight="bold", parse_math=False,
        )  # fmt: skip
        panels = figure.subplots(2, 2, width_ratios=[1.25, 1], height_ratios=[1.2, 1])
        _draw_accuracy(panels[0, 0], rounds, start)
        _draw_loss(panels[1, 0], rounds)
        _draw_classes(panels[0, 1], rounds[-1])
        _draw_seconds(panels[1, 1], rounds)
        try:
            figure.savefig(path, dpi=140)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise FederationError(f"cannot write '{path}' ({error.strerror})") from error


def _by_round(axes: Any, rounds: Rounds, first: float) -> list[int]:
    """Label an axis with rounds; return their numbers."""
    from matplotlib.ticker import MaxNLocator

    numbers = [row["server_round"] for row in rounds]
    axes.set_xlim(min(first, numbers[0] - 0.5), numbers[-1] + 0.04 * len(numbers) + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")
    axes.grid(axis="y", color=PALE)
    axes.tick_params(length=0)
    return numbers


def _draw_accuracy(axes: Any, rounds: Rounds, start: float | None) -> None:
    numbers = _by_round(axes, rounds, -0.2 if rounds[0]["server_round"] == 1 else math.inf)
    values = [100 * number(row, "accuracy") for row in rounds]
    if numbers[0] == 1 and start is not None:
        first = 100 * start
        axes.plot([0, 1], [first, values[0]], ":", color=BLUE, linewidth=2)
        axes.plot(0, first, "o", markerfacecolor="white", color=BLUE)
        axes.annotate(
            f"start {first:.1f} %", (0, first), textcoords="offset points", xytext=(8, -4)
        )
    marker = "o" if len(numbers) <= 40 else ""
    axes.plot(numbers, values, color=BLUE, linewidth=2.4, marker=marker, markersize=5)
    axes.set(title="Test accuracy", ylim=(0, 100))
    axes.yaxis.set_major_formatter("{x:.0f} %")
    if math.isfinite(values[-1]):
        axes.annotate(
            f"{values[-1]:.1f} %", (numbers[-1], values[-1]), textcoords="offset points",
            xytext=(0, 10 if values[-1] < 88 else -22), ha="center", fontsize=15,
            fontweight="bold", color=BLUE,
        )  # fmt: skip


def _draw_loss(axes: Any, rounds: Rounds) -> None:
    numbers = _by_round(axes, rounds, math.inf)
    losses = [number(row, "loss") for row in rounds]
    marker = "o" if len(numbers) <= 40 else ""
    axes.plot(numbers, losses, color=RED, linewidth=2.4, marker=marker, markersize=5)
    axes.set(title="Test loss (cross-entropy)")
    axes.set_ylim(0, 1.1 * max(filter(math.isfinite, losses), default=0) or 1)


def _draw_classes(axes: Any, last: Mapping[str, Any]) -> None:
    """Draw the last round's accuracy by class, the worst below."""
    found = last.get("class_accuracy")
    classes = found if isinstance(found, Mapping) else {}
    known = [(name, 100 * number(classes, name)) for name in classes]
    known = [(name, value) for name, value in known if math.isfinite(value)]
    title = "Accuracy by class"
    if len(known) > MAX_CLASSES:
        known.sort(key=lambda pair: pair[1], reverse=True)
        half = MAX_CLASSES // 2
        title += f": the {half} best and the {half} worst of {len(known)}"
        known = known[:half] + known[-half:]
    axes.set(title=title, xlim=(0, 100))
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    if not known:
        axes.set_yticks([])
        return
    places = range(len(known), 0, -1)
    small = 7.5 if len(known) > 12 else 9
    axes.barh(places, [100] * len(known), color=PALE, height=0.7, alpha=0.6)
    axes.barh(places, [value for _, value in known], color=BLUE, height=0.7)
    axes.set_yticks(
        places, [shortened(name, 18) for name, _ in known], parse_math=False, fontsize=small
    )
    for place, (_, value) in zip(places, known, strict=True):
        inside = value > 20
        axes.annotate(
            f"{value:.0f} %", (value, place), textcoords="offset points", va="center",
            fontsize=small, xytext=(-5 if inside else 5, 0), ha="right" if inside else "left",
            color="white" if inside else INK,
        )  # fmt: skip


def _draw_seconds(axes: Any, rounds: Rounds) -> None:
    """Draw what a round takes on each device, of many devices the quantiles by round."""
    axes.tick_params(length=0)
    found = {device["name"] for row in rounds for device in row.get("devices", [])}
    if len(found) > MAX_BARS:
        _draw_quantiles(axes, rounds, len(found))
        return
    times: dict[str, list[list[float]]] = defaultdict(list)  # by name: [sending, training, …]
    for row in rounds:
        for device in row.get("devices", []):
            times[device["name"]].append(_parts(device))
    names = sorted(found, key=natural)
    means = np.array([np.mean(times[name], axis=0) for name in names]).reshape(-1, len(PARTS))
    places = np.arange(len(names))
    bottom = np.zeros(len(names))
    for (part, colour), values in zip(PARTS.items(), means.T, strict=True):
        axes.bar(places, values, 0.62, bottom=bottom, color=colour, label=part)
        bottom += values
    few = len(names) <= 12
    axes.set(title="Seconds a round, by device" + (" (mean)" if len(rounds) > 1 else ""))
    shown = [shortened(name, 14) for name in names] if few else []
    axes.set_xticks(
        places if few else [], shown, rotation=0 if len(names) < 6 else 35, parse_math=False
    )
    if not few:
        axes.set_xlabel(f"{len(names)} devices")
    axes.grid(axis="y", color=PALE)
    axes.set_xlim(-0.7, max(len(names) - 0.3, 0.7))
    if names:
        axes.margins(y=0.25)
        axes.legend(ncols=len(PARTS), loc="upper right", handlelength=1, handleheight=1)


def _parts(device: Mapping[str, Any]) -> list[float]:
    """Return a device's seconds in a round as PARTS."""
    whole, sending, receiving = (
        value if math.isfinite(value := number(device, name)) else 0.0
        for name in ("seconds", "seconds_sending", "seconds_receiving")
    )
    return [sending, max(0.0, whole - sending), receiving]


def _draw_quantiles(axes: Any, rounds: Rounds, count: int) -> None:
    numbers = _by_round(axes, rounds, math.inf)
    wanted = (0, 10, 25, 50, 75, 90, 100)
    rows = [[number(device, "seconds") for device in row.get("devices", [])] for row in rounds]
    found = np.array([np.percentile(row, wanted) if row else [math.nan] * 7 for row in rows]).T
    for low, high, alpha, label in ((0, 6, 0.15, "all"), (1, 5, 0.25, "80 %"), (2, 4, 0.4, "50 %")):
        axes.fill_between(
            numbers, found[low], found[high], color=BLUE, alpha=alpha, linewidth=0, label=label
        )
    axes.plot(numbers, found[3], color=BLUE, linewidth=2.4, label="median")
    axes.set(title=f"Seconds a round, of {count:,} devices")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.25)
    axes.legend(ncols=4, loc="upper right", handlelength=1.2)

"""report.png: a run at a glance."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from federated.errors import FederationError
from plumbing.board import MEGABYTES, TEMPERATURES, WATTS


def draw_report(path: Path, title: str, rounds: Sequence[Mapping[str, Any]]) -> None:
    """Draw accuracy, loss, and seconds a device, by round.

    Args:
        rounds: the lines of metrics.jsonl; without any there is nothing to draw.

    Raises:
        FederationError: the picture cannot be written.
    """
    if not rounds:
        return
    from matplotlib.figure import Figure  # here: it takes half a second that a run can do without
    from matplotlib.ticker import MaxNLocator

    numbers = [metrics["server_round"] for metrics in rounds]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(title, parse_math=False)  # a path may hold dollar signs
    accuracy, loss, seconds = figure.subplots(1, 3)

    accuracy.plot(numbers, [100 * number(metrics, "accuracy") for metrics in rounds], "o-")
    accuracy.set(title="Test accuracy", ylabel="%", ylim=(0, 100))
    last = 100 * number(rounds[-1], "accuracy")
    accuracy.annotate(
        f"{last:.1f} %",
        (numbers[-1], last),
        textcoords="offset points",
        xytext=(0, 8 if last < 90 else -16),  # inside near 100 %, too
        ha="center",
    )
    losses = [number(metrics, "loss") for metrics in rounds]
    loss.plot(numbers, losses, "o-", color="tab:red")
    loss.set(title="Test loss", ylabel="cross-entropy")
    loss.set_ylim(0, 1.1 * max(filter(math.isfinite, losses), default=0) or 1)

    names = sorted({device["name"] for metrics in rounds for device in metrics.get("devices", [])})
    for name in names:
        points = [
            (metrics["server_round"], device["seconds"])
            for metrics in rounds
            for device in metrics.get("devices", [])
            if device["name"] == name
        ]
        label = name if len(names) <= 10 else None  # a legend of hundreds hides the picture
        seconds.plot(*zip(*points, strict=True), "o-", label=label, alpha=0.7)
    whole = [number(metrics, "seconds") for metrics in rounds]
    seconds.plot(numbers, whole, "k--", label="whole round")
    seconds.set(title="Time", ylabel="seconds")
    seconds.set_ylim(bottom=0)
    seconds.legend()

    for axes in (accuracy, loss, seconds):
        axes.set_xlabel("round")
        axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise FederationError(f"cannot write '{path}' ({error.strerror})") from error


def number(metrics: Mapping[str, Any], name: str) -> float:
    """Return a number of a round; NaN, which JSON cannot hold, where there is none."""
    value = metrics.get(name)
    return value if isinstance(value, int | float) else math.nan


def device_line(device: Mapping[str, Any]) -> str:
    """Return a line on what one device did in a round.

    Args:
        device: an entry of "devices" in metrics.jsonl. Its "metrics" are the device's word:
            what is missing, of another type or absurd is left out.
    """
    metrics = device.get("metrics")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    cells = [f"{device.get('name', '')!s:<10}"]

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

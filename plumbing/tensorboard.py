"""TensorBoard's event files in a run's directory: `tensorboard --logdir runs` shows them."""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from federated.rounds import Contribution, Observed, Started, Step

MAX_DEVICES = 100  # with curves of their own; metrics.jsonl has all
DEVICE_METRICS = ("loss", "images_per_second", "cpu_temperature", "peak_ram_mb", "power_watts")


class TensorBoard:
    """An observer that writes test results and what devices report, once a round.

    The file is made at the first round that is finished. One that cannot be written is reported
    once and never ends a run.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.writer: Any = None
        self.start: Mapping[str, Any] = {}  # what the run began with, until the file is made
        self.named: set[str] = set()  # devices with curves
        self.stopped = False

    def __call__(self, event: Observed | Step) -> None:
        if isinstance(event, Started):
            self.start = event.evaluation
        if not isinstance(event, Step) or self.stopped:
            return
        # Imported here: the package wants torch, which a server has loaded by now.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in self._scalars(event)]
        records = [
            Event(wall_time=time.time(), step=event.server_round, summary=Summary(value=values))
        ]
        try:
            if not self.writer:
                self.writer = EventsWriter(str(self.directory / "events"))
                # What an earlier server wrote on this round and later ones is void.
                start = SessionLog(status=SessionLog.START)
                records.insert(0, Event(step=event.server_round, session_log=start))
                if self.start:
                    tested = [Summary.Value(tag=t, simple_value=v) for t, v in _tested(self.start)]
                    records.insert(0, Event(wall_time=time.time(), summary=Summary(value=tested)))
            for record in records:
                self.writer.write_event(record)
            self.writer.flush()
        except OSError as error:
            self.stopped = True
            print(
                f"cannot write TensorBoard's events to '{self.directory}' ({error.strerror}); "
                "they end here",
                file=sys.stderr,
            )

    def _scalars(self, step: Step) -> Iterator[tuple[str, float]]:
        """Yield tags and values; what is no finite number is left out."""
        yield from _tested(step.evaluation)
        yield "seconds/round", step.seconds + step.seconds_evaluate
        yield "devices/counted", len(step.contributions)
        yield "devices/dropped", len(step.dropped)
        for contribution in step.contributions:
            yield from self._device(contribution)

    def _device(self, contribution: Contribution) -> Iterator[tuple[str, float]]:
        name = contribution.device.name.replace(" ", "_")
        if name not in self.named and len(self.named) >= MAX_DEVICES:
            return
        self.named.add(name)
        yield f"{name}/seconds", contribution.seconds
        for metric in DEVICE_METRICS:
            yield from _finite(f"{name}/{metric}", contribution.metrics.get(metric))


def _tested(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name in ("loss", "accuracy", "validation_loss", "validation_accuracy"):
        of, _, what = name.rpartition("_")
        yield from _finite(f"{what}/{of or 'test'}", evaluation.get(name))
    for name, value in dict(evaluation.get("class_accuracy", {})).items():
        yield from _finite(f"class_accuracy/{name}", value)


def _finite(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if type(value) in (int, float) and math.isfinite(value):
        yield tag, value

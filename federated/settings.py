"""All that a server decides, declared once.

RunSettings are the server's: the command line, config.json, `flwr run` and the documentation
read names, types, defaults, ranges and help from it. Settings are what a device needs of them
in one round, as they cross the wire with their types.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

from federated.errors import FederationError

# Settings that differ from Flower's defaults. --strategy FedAdam:eta=0.02 changes them.
STRATEGIES: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedProx": {"proximal_mu": 0.01},  # Flower's default, 0, is FedAvg
    "FedAvgM": {"server_momentum": 0.5},  # Flower's default, 0, is FedAvg
    # Flower's eta of 0.1 moves each weight by 0.1 a round, which is more than most of them
    # weigh. 1e-2 and 1e-3 are near the best of Reddi et al. 2021 (arXiv:2003.00295) for CIFAR-10.
    "FedAdam": {"eta": 0.01, "tau": 1e-3},
    "FedYogi": {"eta": 0.01, "tau": 1e-3},
    "FedAdagrad": {"eta": 0.01, "tau": 1e-3},
    "FedMedian": {},
    "FedTrimmedAvg": {},
    "Krum": {},
    "MultiKrum": {},
    "Bulyan": {},
    "QFedAvg": {},
}
REPLACED = {"FedOpt": "FedAdam, FedYogi or FedAdagrad", "FaultTolerantFedAvg": "FedAvg"}

OPEN_ENDED = 1_000_000  # rounds of a service without an end
SCHEDULES = ("linear", "cosine", "constant")  # of the learning rate, over the rounds
CHOICES = {
    "lr_schedule": SCHEDULES,
    "sampling": ("shuffled", "balanced"),
    "augment": ("flip", "crop"),
    "weighting": ("examples", "equal"),
}


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "N",
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
) -> Any:
    """Declare a setting: its default, what it does, its unit and the range of its values.

    Args:
        unit: what the command line shows for its value: N, S (seconds), NAME, …
        low, high: the least and the greatest value.
        above: every value is greater than this.
    """
    limits = {"low": low, "high": high, "above": above}
    return field(default=default, metadata={"help": help, "unit": unit, **limits})


@dataclass(frozen=True)
class RunSettings:
    """What the server decides for a run."""

    rounds: int = setting(3, "rounds of training", low=1)
    model: str = setting(
        "Net", "a name in utils.MODELS, or your own mine:Mine; on every device", unit="NAME"
    )
    strategy: str = setting(
        "FedAvg",
        "how updates are combined; settings follow a colon: FedProx:proximal_mu=0.1",
        unit="NAME",
    )
    seed: int = setting(
        0, "for the first weights, partitions, sampling and shuffling", low=0, high=2**31 - 1
    )
    # Devices
    min_num_clients: int = setting(2, "wait until this many devices are connected", low=1)
    min_sample_size: int = setting(
        0,
        "train on at least this many devices in a round; 0 is min_num_clients, but 2 at most",
        low=0,
    )
    sample_fraction: float = setting(
        1.0, "fraction of the idle devices that train in a round", unit="F", above=0, high=1
    )
    sample_fraction_evaluate: float = setting(
        0.0,
        "fraction of the idle devices that evaluate each new model, too, on their test images",
        unit="F",
        low=0,
        high=1,
    )
    round_timeout: float = setting(
        0.0, "close a round after S seconds; 0 is never", unit="S", low=0
    )
    # Local training
    epochs: int = setting(1, "passes over a device's images in a round", low=1)
    round_seconds: float = setting(
        0.0, "a device trains for S seconds at most; 0 is no limit", unit="S", low=0
    )
    batch_size: int = setting(32, "images in a training step", low=1)
    lr: float = setting(0.02, "learning rate at the start", unit="LR", above=0)
    lr_schedule: str = setting(
        "linear",
        "how it changes over the run: linear or cosine, both down to 0, or constant",
        unit="HOW",
    )
    weight_decay: float = setting(
        0.0, "of the devices' SGD: L2 penalty of D/2", unit="D", low=0, high=1
    )
    momentum: float = setting(0.9, "of the devices' SGD", unit="M", low=0, high=0.999)
    label_smoothing: float = setting(
        0.0, "of the target, what is spread over all classes", unit="F", low=0, high=0.9
    )
    sampling: str = setting(
        "shuffled",
        "how a device goes through its images in an epoch: shuffled, or balanced, by which each "
        "class comes as often",
        unit="HOW",
    )
    augment: str = setting(
        "flip",
        "how a device changes images at each step: flip mirrors half of them, crop shows parts "
        "and changes brightness and colour, too",
        unit="HOW",
    )
    weighting: str = setting(
        "examples", "what a device counts by: its examples, or equal, as any other", unit="HOW"
    )
    # What must hold for a round to count
    min_replies: int = setting(1, "good replies that a round needs", low=1)
    round_retries: int = setting(2, "retries of a round that has fewer", low=0)
    max_update_norm: float = setting(
        0.0, "drop updates of a larger norm; 0 learns the limit from the others", unit="D", low=0
    )
    max_weight_ratio: float = setting(
        20.0, "a device counts at most R times the usual number of examples", unit="R", low=1
    )
    # Data
    partition: str = setting(
        "auto",
        "how a data set that every device has in full is split: iid, dirichlet:0.5, none; auto is "
        "iid for CIFAR-10 and synthetic images, none for folders of images",
        unit="HOW",
    )
    num_partitions: int = setting(0, "parts; 0 is min_num_clients", low=0)

    validation: float = setting(
        0.0,
        "fraction of the server's images that choose the best round, and test nothing; 0 is none",
        unit="F",
        low=0,
        high=0.5,
    )

    def check(self) -> None:
        """Raise FederationError for a value that is out of range, or values that do not fit."""
        for declared in fields(self):
            value, limits = getattr(self, declared.name), declared.metadata
            if isinstance(value, str):
                continue
            if not (limits["low"] <= value <= limits["high"] and value > limits["above"]):
                raise FederationError(f"--{declared.name} {value:g} is {_range(limits)}")
            if not math.isfinite(value):
                raise FederationError(f"--{declared.name} {value} is not finite")
        parse_partition(self.partition)
        check_strategy(self.strategy)
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise FederationError(f"no --{name} '{value}'; choose {', '.join(choices)}")
        if 0 < self.round_timeout <= self.round_seconds:
            raise FederationError(
                f"--round_timeout {self.round_timeout:g} leaves no time to reply after "
                f"--round_seconds {self.round_seconds:g}; make it larger"
            )
        if self.min_replies > self.sample_size:
            raise FederationError(
                f"--min_replies {self.min_replies} is above --min_sample_size {self.sample_size}"
            )
        if self.min_sample_size > self.min_num_clients:
            raise FederationError(
                f"--min_sample_size {self.min_sample_size} is above --min_num_clients "
                f"{self.min_num_clients}; a round cannot sample more devices than it waits for"
            )

    @property
    def sample_size(self) -> int:
        """Devices that train in a round at least."""
        return self.min_sample_size or min(self.min_num_clients, 2)

    def _lr_after(self, server_round: int) -> float:
        """Return the learning rate at the end of a round."""
        done = server_round / self.rounds
        if self.lr_schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * done)) / 2
        return self.lr if self.lr_schedule == "constant" else self.lr * (1 - done)

    def for_round(self, server_round: int) -> Settings:
        """Return a round's settings; within it the learning rate changes linearly."""
        return Settings(
            lr=self._lr_after(server_round - 1),
            lr_end=self._lr_after(server_round),
            server_round=server_round,
            epochs=self.epochs,
            round_seconds=self.round_seconds,
            batch_size=self.batch_size,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            sampling=self.sampling,
            augment=self.augment,
            partition=self.partition,
            num_partitions=self.num_partitions or self.min_num_clients,
            seed=self.seed,
        )


@dataclass(frozen=True)
class EngineSettings:
    """What `flwr run` needs beside RunSettings: files, and how devices train.

    A node's own configuration (--node-config) overrides all but the server's files.
    """

    data_dir: str = setting(
        "synthetic", "CIFAR-10, or folders train, test; absolute, or synthetic", unit="DIR"
    )
    run_dir: str = setting("", "where to leave results; absolute", unit="DIR")
    init_weights: str = setting("", "start from this .safetensors file", unit="FILE")
    resume: str = setting("", "continue the run in this directory", unit="DIR")
    override: str = setting(
        "",
        "names of settings, as in rounds,lr, that hold for a resumed run although they have their "
        "default; those with another value always do",
        unit="NAMES",
    )
    device: str = setting("auto", "where nodes train: auto, cpu or cuda", unit="DEVICE")
    threads: int = setting(0, "processor threads of a node; 0 is Flower's number", low=0)


def _range(limits: Mapping[str, Any]) -> str:
    """Return in words what a value outside the limits is."""
    low, high, above = (limits[name] for name in ("low", "high", "above"))
    if high < math.inf:
        least = f"[{low:g}" if math.isfinite(low) else f"({above:g}"
        return f"outside {least}, {high:.10g}]"
    return f"below {low:g}" if math.isfinite(low) else f"not above {above:g}"


@dataclass(frozen=True)
class Settings:
    """What a device needs to know for a round.

    The defaults are what a device uses when a server, such as a stock Flower one, does not
    send a setting.
    """

    lr: float  # at the first step of this round
    lr_end: float  # at its last step; falls linearly in between
    server_round: int = 0
    epochs: int = 1
    round_seconds: float = 0.0  # stop training after this time; 0 is never
    batch_size: int = 32
    momentum: float = 0.9
    weight_decay: float = 0.0
    label_smoothing: float = 0.0  # Szegedy et al. 2016, arXiv:1512.00567
    sampling: str = "shuffled"  # or "balanced": each class as often
    augment: str = "flip"  # or "crop": parts, and other colours
    proximal_mu: float = 0.0  # FedProx's mu; 0 is FedAvg
    partition: str = "none"  # how a data set that every device has in full is split
    num_partitions: int = 1
    seed: int = 0
    run_id: str = ""

    def to_config(self) -> dict[str, Any]:
        """Return the settings as they travel."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], default_lr: float) -> Settings:
        """Read settings that travelled; other keys are left alone.

        Raises:
            FederationError: a value is of another type than its setting.
        """
        values = {"lr": default_lr, **typed(cls, config, "the server's setting")}
        values.setdefault("lr_end", values["lr"])
        return cls(**values)


def check_strategy(choice: str) -> None:
    """Raise FederationError if --strategy names no strategy, without a look at Flower."""
    name, _, text = choice.partition(":")
    if name in REPLACED:
        raise FederationError(f"Flower has no {name} any more; use {REPLACED[name]}")
    class_name = text.partition(":")[0]
    if name not in STRATEGIES and (not class_name or "=" in class_name):
        raise FederationError(
            f"no strategy '{name}'; there are {', '.join(STRATEGIES)}, or your own class Mine in "
            "mine.py as --strategy mine:Mine"
        )


def parse_partition(scheme: str) -> tuple[str, float]:
    """Return ("auto", 0), ("iid", 0), ("none", 0) or ("dirichlet", ALPHA) for `scheme`.

    Raises:
        FederationError: no such scheme.
    """
    kind, _, value = scheme.partition(":")
    if kind in ("auto", "iid", "none") and not value:
        return kind, 0.0
    if kind == "dirichlet":
        with contextlib.suppress(ValueError):
            if 1e-6 <= (alpha := float(value)) <= 1e6:  # beyond, doubles fail and nothing changes
                return kind, alpha
    raise FederationError(
        f"no partition '{scheme}'; choose auto, iid, none or dirichlet:0.5 "
        "(any number from 1e-6 to 1e6)"
    )


def typed(declaring: type, config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return of `config` the fields of a dataclass, by their names with underscores.

    Raises:
        FederationError: a value is of another type than its field.
    """
    values: dict[str, Any] = {}
    received = underscored(config)
    for name, expected in get_type_hints(declaring).items():
        if name not in received:
            continue
        value = received[name]
        if expected is float and type(value) is int:
            value = float(value)
        if type(value) is not expected:
            raise FederationError(
                f"{what} {name} is {value!r}, not of type {getattr(expected, '__name__', expected)}"
            )
        values[name] = value
    return values


def underscored(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with Flower's hyphens (proximal-mu) as underscores (proximal_mu).

    Where both are there, the one with hyphens holds: a strategy has put it beside ours.
    """
    names = sorted(config, key=lambda name: "-" in name)
    return {name.replace("-", "_"): config[name] for name in names}

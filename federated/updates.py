"""What a device brings back, and what it must be before it may touch the global model."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Dict, Union

import numpy as np

from federated.errors import BadReply

Weights = Dict[str, np.ndarray]  # arrays by name, in the order of the model's state_dict
Scalar = Union[bool, float, int, str]

NON_FINITE = "non-finite values"  # in each message on them
MAX_EXAMPLES = 100_000_000  # more images than any board holds


@dataclass(frozen=True)
class Update:
    """What a device trained, relative to the weights that it received.

    Attributes:
        delta: trained minus received, in float64, for each array of floats.
        counters: the arrays of integers as they are on the device, such as BatchNorm's
            num_batches_tracked; they are averaged beside the delta, and rounded.
        num_examples: images trained on.
        metrics: finite numbers and short strings that the device reports.
        norm: the square root of the sum of squares over all of `delta`.
    """

    delta: Weights
    num_examples: int
    metrics: Mapping[str, Scalar] = field(default_factory=dict)
    counters: Weights = field(default_factory=dict)
    norm: float = 0.0


@dataclass(frozen=True)
class Score:
    """How good a device finds a model, on its own test images."""

    loss: float
    num_examples: int  # images tested on
    metrics: Mapping[str, Scalar] = field(default_factory=dict)  # finite numbers, short strings


def fingerprint(weights: Weights) -> str:
    """Return a line on the model's form: how large it is, and a hash of names, shapes, types."""
    form = [(name, array.shape, array.dtype.str) for name, array in weights.items()]
    numbers = sum(array.size for array in weights.values())
    digest = hashlib.sha256(repr(form).encode()).hexdigest()[:12]
    return f"{len(form)} arrays of {numbers:,} numbers, sha256:{digest}"


def checksum(weights: Weights) -> int:
    """Return a CRC-32 of all numbers: 20 ms for ResNet18's 45 MB."""
    value = 0
    for array in weights.values():
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def make_update(
    arrays: Iterable[np.ndarray],
    model: Weights,
    num_examples: int,
    metrics: Mapping[str, Any] | None = None,
) -> Update:
    """Compare trained arrays with the model that was sent, and return the difference.

    float64(trained) - float64(received) is exact for float32 values of similar size, so that
    the mean of deltas is the mean of weights.

    Args:
        arrays: in the order of `model`; each is read once, so a generator saves memory.

    Raises:
        BadReply: another number, shape or type of arrays, a value that is not finite, or a
            `num_examples` that cannot be.
    """
    check_examples(num_examples, "trained")
    delta: Weights = {}
    counters: Weights = {}
    squares = 0.0
    count = 0
    names = iter(model.items())
    for count, trained in enumerate(arrays, 1):
        name, received = next(names, ("", None))
        if received is None:
            count += sum(1 for _ in arrays)
            break
        if trained.shape != received.shape or trained.dtype != received.dtype:
            raise BadReply(
                f"{name} is {trained.dtype} {trained.shape}, not {received.dtype} {received.shape}"
            )
        if received.dtype.kind != "f":
            counters[name] = trained.copy()  # it may be a view of the bytes received
            continue
        delta[name] = np.subtract(trained, received, dtype=np.float64)
        flat = delta[name].reshape(-1)
        # In one thread: BLAS would start several, and wait for them where the cores are busy.
        square = float(np.einsum("i,i->", flat, flat))
        if not math.isfinite(square):  # one pass finds NaN and infinity as well as the norm
            bad = trained.size - np.count_nonzero(np.isfinite(trained))
            raise BadReply(f"{name} has {bad} {NON_FINITE}")
        squares += square
    if count != len(model):
        raise BadReply(f"{count} arrays for a model that has {len(model)}")
    return Update(delta, num_examples, clean_metrics(metrics or {}), counters, math.sqrt(squares))


def make_score(loss: float, num_examples: int, metrics: Mapping[str, Any]) -> Score:
    """Return what a device reports of an evaluation; raise BadReply for what cannot be."""
    check_examples(num_examples, "evaluated")
    if type(loss) not in (int, float) or not math.isfinite(loss):
        raise BadReply(f"its loss is {loss}")
    return Score(float(loss), num_examples, clean_metrics(metrics))


def check_examples(num_examples: int, what: str) -> None:
    """Raise BadReply for a number of images that no board holds."""
    if type(num_examples) is not int or not 0 < num_examples <= MAX_EXAMPLES:
        raise BadReply(f"{what} on {num_examples} examples")


def clean_metrics(metrics: Mapping[str, Any]) -> dict[str, Scalar]:
    """Keep of a device's metrics what fits into a table: finite numbers, short strings."""
    kept: dict[str, Scalar] = {}
    for name, value in list(metrics.items())[:100]:
        if len(name) > 100 or not name.isprintable() or not isinstance(value, (float, int, str)):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            continue
        if isinstance(value, str) and (len(value) > 1000 or not value.isprintable()):
            continue
        kept[name] = value
    return kept


def is_finite(arrays: Iterable[np.ndarray]) -> bool:
    """Return whether no array of floats has a NaN or an infinity."""
    return all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f")


def norm_of(weights: Weights) -> float:
    """Return the square root of the sum of squares over all arrays of floats."""
    floats = [a.reshape(-1) for a in weights.values() if a.dtype.kind == "f"]
    # Without an array of squares in float64, twice as large as the weights.
    return math.sqrt(sum(float(np.einsum("i,i->", a, a, dtype=np.float64)) for a in floats))


def lower_median(numbers: Iterable[float]) -> float:
    """Return the middle number, of an even count the lower of the two; infinity for none."""
    ordered = sorted(numbers)
    return ordered[(len(ordered) - 1) // 2] if ordered else math.inf


class Bounds:
    """What an update may weigh and how far it may go, learned from earlier updates.

    One device must not outweigh the others by what it claims, nor replace the model by one
    enormous update. Both bounds are known before a reply arrives, since the mean is a running
    one. They are relative to the lower median, which half of the devices must be dishonest to
    move; of two devices nobody can know which one is right.

    Args:
        max_norm: a fixed limit for `Update.norm` instead of the learned one; 0 is none.
        max_weight_ratio: how often the usual `num_examples` one device may count.
    """

    NORM_FACTOR = 100.0  # 1 step in one device and 1,500 in another differ by 20 to 60
    MEMORY = 200  # numbers that are kept of earlier rounds

    def __init__(self, max_norm: float = 0.0, max_weight_ratio: float = 20.0) -> None:
        self.max_norm = max_norm
        self.max_weight_ratio = max_weight_ratio
        self.norms: list[float] = []  # of accepted updates in earlier rounds
        self.examples: list[float] = []

    def norm_limit(self, model: Weights) -> float:
        """Return how large the norm of an update in this round may be."""
        if self.max_norm:
            return self.max_norm
        return (
            self.NORM_FACTOR * self._usual_norm(model) or math.inf
        )  # all weights are 0: there is no measure

    def examples_limit(self, declared: Iterable[int]) -> int:
        """Return how many examples of one device may count.

        Args:
            declared: the images that the devices of this round reported when they joined.
        """
        usual = lower_median(n for n in [*declared, *self.examples] if n > 0)
        return int(min(self.max_weight_ratio * usual, MAX_EXAMPLES))

    def outliers(self, norms: Mapping[str, float], model: Weights) -> set[str]:
        """Return whose norm is out of all proportion to the others' of the same round.

        A device that sends next to nothing must not make the others look large: an outlier is
        also well above what is usual.
        """
        if self.max_norm:
            return set()
        limit = self.NORM_FACTOR * lower_median(norm for norm in norms.values() if norm > 0)
        if max(norms.values(), default=0.0) <= limit:  # mostly; the model need not be looked at
            return set()
        limit = max(limit, 10 * self._usual_norm(model))
        return {name for name, norm in norms.items() if norm > limit}

    def _usual_norm(self, model: Weights) -> float:
        """Return the lower median of the earlier rounds' norms; at first that of the model."""
        return lower_median(self.norms) if self.norms else norm_of(model)

    def learn(self, norms: Iterable[float], examples: Iterable[int]) -> None:
        """Remember what was accepted in a round."""
        moved = sorted(norm for norm in norms if norm > 0)  # others did not train
        self.norms = [*self.norms, *moved][-self.MEMORY :]
        self.examples = [*self.examples, *sorted(examples)][-self.MEMORY :]

    def state(self) -> dict[str, list[float]]:
        """Return what `restore` takes, for a checkpoint."""
        return {"norms": list(self.norms), "examples": list(self.examples)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned; what is not of that form is ignored."""
        for name in ("norms", "examples"):
            values = state.get(name)
            if isinstance(values, list) and all(
                type(v) in (int, float) and math.isfinite(v) and v >= 0 for v in values
            ):
                setattr(self, name, values[-self.MEMORY :])

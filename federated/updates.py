"""What a reply must be before it may touch the global model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from federated.errors import BadReply

MAX_EXAMPLES = 100_000_000  # more images than any board holds


def check_update(
    weights: Sequence[np.ndarray],
    num_examples: int,
    global_weights: Sequence[np.ndarray],
    names: Sequence[str],
    max_norm: float = math.inf,
) -> None:
    """Compare an update with the model that it must fit.

    Args:
        names: the name of each array of `global_weights`.
        max_norm: how far the update may be from the global weights: the square root of the
            sum of squared differences over all arrays of floats.

    Raises:
        BadReply: another number, shape or type of arrays, a value that is not finite, a
            `num_examples` that cannot be, or an update too far away.
    """
    if len(weights) != len(global_weights):
        raise BadReply(f"{len(weights)} arrays for a model that has {len(global_weights)}")
    for name, update, current in zip(names, weights, global_weights, strict=True):
        if update.shape != current.shape or update.dtype != current.dtype:
            raise BadReply(
                f"{name} is {update.dtype} {update.shape}, not {current.dtype} {current.shape}"
            )
        if update.dtype.kind == "f" and not (finite := np.isfinite(update)).all():
            raise BadReply(f"{name} has {update.size - np.count_nonzero(finite)} non-finite values")
    if not 0 < num_examples <= MAX_EXAMPLES:
        raise BadReply(f"trained on {num_examples} examples")
    if math.isfinite(max_norm):
        distance = math.sqrt(
            sum(
                float(np.sum(np.square(update - current, dtype=np.float64)))
                for update, current in zip(weights, global_weights, strict=True)
                if update.dtype.kind == "f"
            )
        )
        if distance > max_norm:
            raise BadReply(
                f"its update is {distance:.3g} away from the global model, "
                f"more than --max_update_norm {max_norm:g}"
            )


def clean_metrics(metrics: Mapping[str, Any]) -> dict[str, float | int | str]:
    """Keep of a device's metrics what can go into a table: finite numbers, short strings."""
    kept: dict[str, float | int | str] = {}
    for name, value in list(metrics.items())[:100]:
        if len(name) > 100 or not name.isprintable() or not isinstance(value, float | int | str):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            continue
        if isinstance(value, str) and (len(value) > 1000 or not value.isprintable()):
            continue
        kept[name] = value
    return kept

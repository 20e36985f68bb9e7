"""How a data set that every device has in full is split between them."""

from __future__ import annotations

import numpy as np

from federated.errors import FederationError
from federated.settings import parse_partition


def partition(labels: np.ndarray, num_partitions: int, scheme: str, seed: int) -> list[np.ndarray]:
    """Split a data set that every device has in full into disjoint parts.

    Args:
        labels: the class of each example, (N,).
        scheme: "iid", or "dirichlet:ALPHA" for skewed classes: each part draws its own
            mix of classes from Dirichlet(ALPHA * p) and takes an equal share of the
            examples by that mix (Hsu et al. 2019, arXiv:1909.06335). Small ALPHA: nearly
            one class a part; large: nearly iid. p is the mix of what earlier parts left;
            with the mix of the whole the last part would be odd even for a large ALPHA.
            Not "auto" or "none", which decide whether a device splits what it has.
        seed: the same seed gives the same parts on every machine.

    Returns:
        Sorted indices into `labels`, one array a part; sizes differ by 1 at most, and
        together they cover every example once.

    Raises:
        FederationError: no such scheme, or a part would be empty.
    """
    kind, alpha = parse_partition(scheme)
    if kind in ("auto", "none"):
        raise ValueError(f"partition '{scheme}' does not split")
    if not 1 <= num_partitions <= len(labels):
        raise FederationError(
            f"cannot split {len(labels)} images into {num_partitions} parts; "
            f"choose 1 to {len(labels)}, or add images"
        )
    rng = np.random.default_rng(seed)
    sizes = [len(part) for part in np.array_split(np.empty(len(labels)), num_partitions)]
    if kind == "iid":
        order = rng.permutation(len(labels))
        return [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]

    classes = np.unique(labels)
    pools = [rng.permutation(np.flatnonzero(labels == c)) for c in classes]
    left = np.array([len(pool) for pool in pools])
    parts = []
    for size in sizes:
        mix, taken = np.zeros(len(classes)), np.zeros_like(left)
        while (missing := size - taken.sum()) > 0:
            rest = left - taken
            mix[rest == 0] = 0
            if mix.sum() == 0:  # at first, and when the classes of this mix are used up
                mix[rest > 0] = rng.dirichlet(alpha * rest[rest > 0] / rest.sum())
            draw = rng.multinomial(missing, mix / mix.sum())
            taken += np.minimum(draw, left - taken)
        parts.append(
            np.sort(np.concatenate([pool[n - t : n] for pool, n, t in zip(pools, left, taken)]))
        )
        left -= taken
    return parts

"""The server's settings for local training, as they cross the wire with their types."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from federated.errors import FederationError


@dataclass(frozen=True)
class Settings:
    """What the server decides for a round.

    The defaults are what a device uses when a server, such as a stock Flower one, does
    not say.
    """

    lr: float  # at the first step of this round
    lr_end: float  # at its last step; falls linearly in between
    server_round: int = 0
    epochs: int = 1
    round_seconds: float = 0.0  # stop training after so long; 0 is never
    batch_size: int = 32
    momentum: float = 0.9
    proximal_mu: float = 0.0  # FedProx's mu; 0 is FedAvg
    partition: str = "none"  # how a data set that every device has in full is split
    num_partitions: int = 1
    seed: int = 0

    def to_config(self) -> dict[str, Any]:
        """Return the settings as a Flower config dict."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], default_lr: float) -> "Settings":
        """Read a Flower config dict; other keys in it are left alone.

        Raises:
            FederationError: a value is of another type than its setting.
        """
        values: dict[str, Any] = {"lr": default_lr}
        for field in fields(cls):
            if field.name not in config:
                continue
            value = config[field.name]
            expected = field.type
            if expected is float and type(value) is int:
                value = float(value)
            if type(value) is not expected:
                raise FederationError(
                    f"the server's setting {field.name} is {value!r}, which is no "
                    f"{getattr(expected, '__name__', expected)}"
                )
            values[field.name] = value
        values.setdefault("lr_end", values["lr"])
        return cls(**values)

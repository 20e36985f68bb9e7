"""How updates become a new model: FedAvg's weighted mean, and Flower's other strategies.

The strategies are Flower's own (flwr.serverapp.strategy) or a user's subclass, driven on
Updates: `Strategy.begin` samples devices, `Training.add` takes what they bring, and
`Training.aggregate` returns the new weights. Most of them need no more than the weighted
mean, which is a running one, so that memory does not grow with the number of devices.

Nothing else that a run over the stream needs imports flwr.
"""

import copy
import hashlib
import inspect
import logging
import math
import random
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import flwr.serverapp.strategy
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, QFedAvg
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from federated.classes import load_class
from federated.errors import FederationError
from federated.rounds import Device, Job, NoModel
from federated.settings import STRATEGIES, check_strategy, underscored
from federated.updates import Scalar, Score, Update, Weights, checksum, clean_metrics

# One reply that holds the weighted mean gives with these what all replies together give.
MEAN_IS_ENOUGH = {
    strategy.aggregate_train
    for strategy in (FedAvg, FedProx, FedAvgM, FedAdam, FedYogi, FedAdagrad)
}

# What Flower's strategies keep of the global weights: configure_train sets it from these.
WEIGHTS_OF_THE_ROUND = "current_arrays"
MINIMUMS = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")  # set in each round


class RunningMean:
    """FedAvg's sum over k of n_k/n * x_k (McMahan et al. 2017, arXiv:1602.05629).

    Arrays are added when they arrive and need not be kept. The sum is exact: each n_k * x_k
    is rounded to a multiple of 2^-24, and float64 adds such numbers without error up to 2^29.
    So the order of arrival does not change a bit of the result, and the rounding moves a mean
    over 1,000 examples or more by less than 1e-10.
    """

    GRID = 2.0**24
    CHUNK = 1 << 15  # numbers at a time: four passes over what stays in the L2 cache

    def __init__(self, like: Weights) -> None:
        self.sums = {name: np.zeros(array.shape) for name, array in like.items()}
        self.num_examples = 0
        largest = max((array.size for array in like.values()), default=0)
        self.chunk = np.empty(min(largest, self.CHUNK))

    def add(self, arrays: Weights, num_examples: int) -> None:
        """Add one device's arrays."""
        self.num_examples += num_examples
        for name, whole in self.sums.items():
            sums, flat = whole.reshape(-1), arrays[name].reshape(-1)
            for start in range(0, flat.size, self.CHUNK):
                piece = flat[start : start + self.CHUNK]
                scaled = self.chunk[: piece.size]
                np.multiply(piece, num_examples * self.GRID, out=scaled, dtype=np.float64)
                np.rint(scaled, out=scaled)
                sums[start : start + self.CHUNK] += scaled

    def means(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each name with its mean in float64; the sums are used up by it."""
        for name in list(self.sums):
            sums = self.sums.pop(name)
            sums /= self.num_examples * self.GRID
            yield name, sums


class Strategy:
    """One of Flower's strategies, or a user's, driven on Updates.

    Args:
        flower: it; its `start` is never called.
        min_sample_size: the least number of devices that a round samples, if that many are idle.
    """

    def __init__(self, flower: Any, min_sample_size: int = 1) -> None:
        allow_messages()
        self.flower = flower
        self.name = type(flower).__name__
        self.min_sample_size = min_sample_size
        self.minimums = {name: getattr(flower, name, 0) for name in MINIMUMS}
        self.fresh = copy.deepcopy(vars(flower))  # its state before it has seen anything
        self.needs_only_mean = (
            type(flower).aggregate_train in MEAN_IS_ENOUGH
            and flower.train_metrics_aggr_fn is FedAvg().train_metrics_aggr_fn
        )
        # Without this the weights would be copied each round, for nobody.
        self.evaluates = (
            type(flower).configure_evaluate is not FedAvg.configure_evaluate
            or flower.fraction_evaluate > 0
        )

    def begin(
        self,
        server_round: int,
        weights: Weights,
        config: Mapping[str, Scalar],
        devices: Sequence[Device],
        seed: str = "",
        at_least: int = 0,
    ) -> "Training | None":
        """Let the strategy choose among idle devices and change their settings.

        Args:
            config: the settings of this round.
            seed: for the sampling: the same seed and devices, the same choice.
            at_least: devices to sample, where that is more than the strategy's fraction of them.

        Returns:
            What takes the updates, or None if it wants more devices than there are.
        """
        state = self._snapshot()
        self._ask_for("min_train_nodes", min(max(self.min_sample_size, at_least), len(devices)))
        configure = self.flower.configure_train
        asked = self._ask(configure, server_round, weights, config, devices, seed)
        if asked is None:
            self._put_back(state)
            return None
        return Training(self, server_round, weights, *asked, state)

    def begin_evaluation(
        self,
        server_round: int,
        weights: Weights,
        config: Mapping[str, Scalar],
        devices: Sequence[Device],
        seed: str = "",
    ) -> "DeviceEvaluation | None":
        """Let the strategy choose who evaluates the new model of a round; as `begin`."""
        state = self._snapshot()
        self._ask_for("min_evaluate_nodes", min(1, len(devices)))
        configure = self.flower.configure_evaluate
        asked = self._ask(configure, server_round, weights, config, devices, seed)
        if asked is None:
            self._put_back(state)
            return None
        return DeviceEvaluation(self, server_round, weights, *asked, state)

    def _ask(
        self,
        configure: Callable[..., Iterable[Message]],
        server_round: int,
        weights: Weights,
        config: Mapping[str, Scalar],
        devices: Sequence[Device],
        seed: str,
    ) -> tuple[ArrayRecord, dict[Device, Message]] | None:
        """Return the weights as the strategy was given them, and whom it asks for what."""
        # All that the plan asks for is here; Flower would sleep until there are more.
        self._ask_for("min_available_nodes", min(self.min_sample_size, len(devices)))
        random.seed(seed)
        np.random.seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big"))
        grid = _Snapshot(devices)
        # FedAvg and FedProx do not look at the weights: they get no copy.
        arrays = ArrayRecord() if type(self.flower) in (FedAvg, FedProx) else to_record(weights)
        try:
            messages = list(configure(server_round, arrays, ConfigRecord(dict(config)), grid))
        except _MoreDevices:
            return None
        return arrays, {grid.device(message): message for message in messages}

    def _ask_for(self, minimum: str, count: int) -> None:
        """Set one of Flower's minimums, unless a class of the user's own asks for more."""
        own = self.minimums[minimum]
        setattr(self.flower, minimum, own if own > self.min_sample_size else count)

    def objection_to(self, update: Update) -> str | None:
        """Return why the strategy cannot aggregate an update, or None.

        QFedAvg weighs by the training loss (Li et al. 2020, arXiv:1905.10497), and would refuse
        the whole round.
        """
        loss = update.metrics.get("loss")
        known = type(loss) in (int, float) and 0 <= float(loss or 0) < float("inf")
        if known or not isinstance(self.flower, QFedAvg):
            return None
        return f"it reports the training loss {str(loss)[:40]!a}, which QFedAvg needs"

    def state(self) -> tuple[Weights, dict[str, Any]]:
        """Return what it remembers from round to round: arrays by name, and the rest for JSON.

        Raises:
            FederationError: it keeps what a checkpoint cannot hold.
        """
        own = getattr(self.flower, "state_dict", None)
        arrays: Weights = {}
        rest = {}
        for name, value in (own() if own else self._changes()).items():
            try:
                rest[name] = _without_arrays(value, name, arrays)
            except TypeError as error:
                raise FederationError(
                    f"the strategy {self.name} keeps {error} in '{name}', which a checkpoint "
                    "cannot hold; give the class state_dict() and load_state_dict()"
                ) from None
        return arrays, rest

    def load_state(self, arrays: Mapping[str, np.ndarray], rest: Mapping[str, Any]) -> None:
        """Take back what `state` returned.

        Raises:
            FederationError: it is not this strategy's.
        """
        try:
            state = {name: _with_arrays(value, arrays) for name, value in rest.items()}
            if load := getattr(self.flower, "load_state_dict", None):
                load(state)
            elif unknown := state.keys() - self.fresh.keys():
                raise KeyError(*unknown)
            else:
                vars(self.flower).update(state)
        except (KeyError, TypeError, ValueError) as error:
            raise FederationError(
                f"the checkpoint holds the state of another strategy than {self.name} "
                f"({error!r}); resume with the --strategy that it had, or start from its weights "
                "with --init_weights"
            ) from None

    def _changes(self) -> dict[str, Any]:
        """Return what differs from a strategy that has seen nothing."""
        known = {WEIGHTS_OF_THE_ROUND, *MINIMUMS}
        return {
            name: value
            for name, value in vars(self.flower).items()
            if name not in known and not _equal(value, self.fresh.get(name))
        }

    def _snapshot(self) -> dict[str, Any]:
        """Return a copy of its state: strategies change theirs while they aggregate."""
        kept = {k: v for k, v in vars(self.flower).items() if k != WEIGHTS_OF_THE_ROUND}
        return copy.deepcopy(kept)

    def _put_back(self, state: Mapping[str, Any]) -> None:
        vars(self.flower).clear()
        vars(self.flower).update(state)
        self._forget_weights()

    def _forget_weights(self) -> None:
        if WEIGHTS_OF_THE_ROUND in self.fresh:
            setattr(self.flower, WEIGHTS_OF_THE_ROUND, self.fresh[WEIGHTS_OF_THE_ROUND])


class _Asked:
    """What a strategy asks of devices, in one round."""

    kind: Literal["train", "evaluate"]

    def __init__(
        self,
        strategy: Strategy,
        server_round: int,
        weights: Weights,
        arrays: ArrayRecord,
        requests: Mapping[Device, Message],
        state: Mapping[str, Any],
    ) -> None:
        self.strategy = strategy
        self.server_round = server_round
        self.weights = weights
        self.arrays = arrays  # the weights as the strategy was given them
        self.requests = requests
        self.state = state  # the strategy's, before it asked

    def jobs(self, job_id: str) -> list[tuple[Device, Job]]:
        """Return which device is asked to do what; equal jobs are one object.

        Raises:
            FederationError: the strategy sends what the stream cannot carry.
        """
        version = self.server_round - (self.kind == "train")
        distinct: dict[tuple[Any, ...], Job] = {}
        jobs = []
        for device, message in self.requests.items():
            record, config = _content(message, self.kind, self.strategy.name)
            key = (id(record), *sorted(config.items()))
            if key not in distinct:
                model = self.weights
                if record is not self.arrays:
                    model = model | self._floats(record)
                # So that no update counts which was trained from other weights: a run may have
                # been resumed from an older copy of its directory.
                name = f"{job_id}-{checksum(model):08x}"
                distinct[key] = Job(name, version, model, config, self.kind)
            jobs.append((device, distinct[key]))
        return jobs

    def roll_back(self) -> None:
        """Give the strategy the state that it had before it asked."""
        self.strategy._put_back(self.state)

    def _floats(self, record: ArrayRecord) -> Weights:
        """Return the arrays of a strategy's record, in the types of the weights."""
        found = {}
        for name, array in record.items():
            old = self.weights.get(name)
            new = np.asarray(array.numpy())
            if old is None or old.dtype.kind != "f" or new.shape != old.shape:
                raise NoModel(f"{self.strategy.name} returns another model's '{name}'")
            found[name] = new.astype(old.dtype)
        return found

    def _call(self, aggregate: Callable[..., Any], replies: Sequence[Message]) -> Any:
        """Return what the strategy makes of replies.

        Raises:
            NoModel: it raises something.
        """
        try:
            return aggregate(self.server_round, replies)
        except Exception as error:  # a strategy may be the user's own
            if type(self.strategy.flower).__module__.partition(".")[0] != "flwr":
                traceback.print_exc()
            raise NoModel(f"{self.strategy.name} cannot aggregate: {error}") from None


class Training(_Asked):
    """A round in the making: who trains, and what came back."""

    kind = "train"

    def __init__(self, *asked: Any) -> None:
        super().__init__(*asked)
        floats = {name: a for name, a in self.weights.items() if a.dtype.kind == "f"}
        self.deltas = RunningMean(floats if self.strategy.needs_only_mean else {})
        self.counters = RunningMean({n: a for n, a in self.weights.items() if n not in floats})
        self.updates: dict[Device, tuple[Update, int]] = {}  # where the mean is not enough

    def add(self, device: Device, update: Update, num_examples: int | None = None) -> None:
        """Take a device's update, with `num_examples` as its weight (default: its own)."""
        weight = update.num_examples if num_examples is None else num_examples
        self.counters.add(update.counters, weight)
        if self.strategy.needs_only_mean:
            self.deltas.add(update.delta, weight)
        else:
            self.updates[device] = (update, weight)

    def aggregate(self) -> Weights:
        """Return the new weights.

        Raises:
            NoModel: the strategy makes none of these updates.
        """
        flower = self.strategy.flower
        if self.strategy.needs_only_mean:
            moved = self._moved(self.deltas.means())
            if type(flower).aggregate_train is FedAvg.aggregate_train:
                return self._counters(moved)
        replies = self._one_reply(moved) if self.strategy.needs_only_mean else self._replies()
        record, _ = self._call(flower.aggregate_train, replies)
        if record is None:
            raise NoModel(f"{self.strategy.name} makes no model of these updates")
        self.strategy._forget_weights()
        return self._counters(self._floats(record))

    def _moved(self, delta: Iterable[tuple[str, np.ndarray]]) -> Weights:
        """Return the arrays of floats, moved by a delta, in their own types."""
        moved = {}
        for name, difference in delta:
            old = self.weights[name]
            # Added in float64, without an array of that type for the sum.
            moved[name] = np.add(old, difference, out=np.empty_like(old), casting="same_kind")
        return moved

    def _counters(self, moved: Weights) -> Weights:
        """Return all weights: those that moved, and the rounded means of the counters."""
        if not self.counters.num_examples:
            return self.weights | moved
        rounded = {
            name: np.rint(mean).astype(self.weights[name].dtype)
            for name, mean in self.counters.means()
        }
        return self.weights | moved | rounded  # in the order of the weights

    def _one_reply(self, moved: Weights) -> list[Message]:
        """Return one reply that stands for all."""
        request = next(iter(self.requests.values()))
        metrics = {"num-examples": self.deltas.num_examples}
        return [_reply(request, metrics, moved)]

    def _replies(self) -> list[Message]:
        """Return all replies, by the device's name: the order of arrival must not matter."""
        shown = _common_numbers([update.metrics for update, _ in self.updates.values()])
        replies = []
        for device, (update, weight) in sorted(self.updates.items(), key=lambda i: i[0].cid):
            metrics = {name: update.metrics[name] for name in shown}
            if "loss" in shown:
                metrics["train_loss"] = float(update.metrics["loss"])  # as QFedAvg calls it
            metrics["num-examples"] = weight
            moved = self._moved(update.delta.items())
            replies.append(_reply(self.requests[device], metrics, moved))
        return replies


class DeviceEvaluation(_Asked):
    """An evaluation on the devices in the making: who evaluates, and what came back."""

    kind = "evaluate"

    def aggregate(self, scores: Mapping[Device, tuple[Score, int]]) -> dict[str, Scalar]:
        """Return what the strategy makes of the devices' scores.

        Args:
            scores: with the weight of each.

        Raises:
            NoModel: it makes nothing of them.
        """
        shown = _common_numbers([score.metrics for score, _ in scores.values()])
        replies = []
        for device, (score, weight) in sorted(scores.items(), key=lambda i: i[0].cid):
            metrics = {name: score.metrics[name] for name in shown}
            metrics |= {"loss": score.loss, "num-examples": weight}
            replies.append(_reply(self.requests[device], metrics))
        record = self._call(self.strategy.flower.aggregate_evaluate, replies)
        return clean_metrics(dict(record or {}))


# --- To and from Flower's records -----------------------------------------------------


def to_record(weights: Weights) -> ArrayRecord:
    """Return the arrays of floats; those of integers go through no strategy."""
    return ArrayRecord({n: Array(a) for n, a in weights.items() if a.dtype.kind == "f"})


def _reply(request: Message, metrics: Mapping[str, Any], weights: Weights | None = None) -> Message:
    content = RecordDict({"metrics": MetricRecord(dict(metrics))})
    if weights is not None:
        content["arrays"] = to_record(weights)
    return Message(content, reply_to=request)


def _common_numbers(metrics: Sequence[Mapping[str, Scalar]]) -> list[str]:
    """Return the names of the numbers that all devices report: Flower refuses other replies."""
    names = set.intersection(*(set(m) for m in metrics)) if metrics else set()
    return sorted(name for name in names if all(type(m[name]) in (int, float) for m in metrics))


def _content(message: Message, kind: str, strategy: str) -> tuple[ArrayRecord, dict[str, Scalar]]:
    """Return what a strategy sends a device: weights and settings.

    Raises:
        FederationError: it is something else.
    """
    sent = message.metadata.message_type
    records, configs = message.content.array_records, message.content.config_records
    if sent != kind or len(records) != 1 or len(configs) != 1:
        raise FederationError(
            f"the strategy {strategy} sends a message of type '{sent}' with {len(records)} models "
            f"and {len(configs)} configs; the stream carries '{kind}' with one of each"
        )
    config = underscored(next(iter(configs.values())))
    for name, value in config.items():
        if not isinstance(value, bool | float | int | str):
            raise FederationError(
                f"the strategy {strategy} sends the setting {name} {value!r}; the stream carries "
                "numbers, strings, true and false"
            )
    return next(iter(records.values())), config


class _MoreDevices(Exception):
    """The strategy waits for more devices than there are."""


class _Snapshot(Grid):
    """The idle devices, as Flower's strategies look at them."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self.devices = {node_id(device.cid): device for device in devices}
        self.asked: list[float] = []  # when

    def device(self, message: Message) -> Device:
        return self.devices[message.metadata.dst_node_id]

    def get_node_ids(self) -> list[int]:
        # FedAvg asks twice. Where it wants more, Flower asks again every second, for ever.
        self.asked.append(time.monotonic())
        if len(self.asked) > 2 and self.asked[-1] - self.asked[-2] > 0.9:
            raise _MoreDevices
        return sorted(self.devices)

    def _not_here(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("a strategy only chooses devices; the schedule talks to them")

    set_run = create_message = push_messages = pull_messages = send_and_receive = _not_here
    run = property(_not_here)


def node_id(cid: str) -> int:
    """Return the number by which Flower's strategies know a device, the same in every run."""
    return int.from_bytes(hashlib.sha256(cid.encode()).digest()[:8], "big") >> 1


def allow_messages() -> None:
    """Let this process make Flower's Messages, as if it were one of Flower's tasks.

    Outside one, `Message(...)` raises until these three are set. There is no public way: look
    here first when a new flwr fails.
    """
    from flwr.supercore.task_identity import TaskIdentity

    if TaskIdentity._task_id is None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


# --- State for a checkpoint -----------------------------------------------------------


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except ValueError:  # arrays
        return False


def _without_arrays(value: Any, path: str, arrays: Weights) -> Any:
    """Return what JSON can hold of `value`, and put its arrays into `arrays` by their path."""
    if isinstance(value, np.ndarray | np.generic):
        arrays[path] = np.asarray(value)
        return {"array": path}
    if isinstance(value, ArrayRecord):
        items = {k: _without_arrays(a.numpy(), f"{path}/{k}", arrays) for k, a in value.items()}
        return {"record": items}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {k: _without_arrays(v, f"{path}/{k}", arrays) for k, v in value.items()}}
    if isinstance(value, list):
        return [_without_arrays(v, f"{path}/{i}", arrays) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__}")


def _with_arrays(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Return what `_without_arrays` took."""
    if isinstance(value, list):
        return [_with_arrays(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "array":
        return arrays[content]
    items = {key: _with_arrays(item, arrays) for key, item in content.items()}
    return ArrayRecord({k: Array(a) for k, a in items.items()}) if kind == "record" else items


def state_of_version_1(arrays: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, Any]:
    """Return the `rest` of a checkpoint that has none: arrays numbered in the model's order."""
    rest: dict[str, Any] = {}
    for kept in dict.fromkeys(path.partition("/")[0] for path in arrays):
        numbered = [{"array": f"{kept}/{i}"} for i in range(len(names))]
        by_name = {"dict": dict(zip(names, numbered, strict=True))}
        rest[kept] = numbered if kept == "momentum_vector" else by_name
    return rest


# --- By name --------------------------------------------------------------------------


def make_strategy(
    choice: str,
    sample_fraction: float = 1.0,
    min_sample_size: int = 1,
    lr: float = 0.02,
    sample_fraction_evaluate: float = 0.0,
) -> Strategy:
    """Return the strategy that `choice` names.

    Args:
        choice: "FedAvg", "FedProx:proximal_mu=0.1", or a class of one's own in the working
            directory, "mine:Mine" or "mine:Mine:alpha=0.1,beta=2".
        sample_fraction: of the idle devices, that a round samples.
        lr: the devices' learning rate, which QFedAvg must know.
        sample_fraction_evaluate: of the idle devices, that evaluate the new model of a round.

    Raises:
        FederationError: there is no such strategy or setting.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)  # what it logs, our observers show
    cls, name, text = _find(choice)
    parameters = inspect.signature(cls).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    common: dict[str, Any] = {
        "fraction_train": sample_fraction,
        "fraction_evaluate": sample_fraction_evaluate,
        "min_train_nodes": min_sample_size,
        "min_evaluate_nodes": min_sample_size,
        "min_available_nodes": min_sample_size,
        "client_learning_rate": lr,
    }
    if anything:
        del common["client_learning_rate"]
    settings = {k: v for k, v in common.items() if k in parameters or anything}
    settings |= STRATEGIES.get(name, {})
    settings |= _parse(text, choice, name, parameters, set(common) - {"client_learning_rate"})
    try:
        strategy = Strategy(cls(**settings), min_sample_size)
    except (TypeError, ValueError) as error:
        raise FederationError(f"--strategy {choice}: {error}") from None
    needed = 4 * getattr(strategy.flower, "num_malicious_nodes", 0) + 3
    if name == "Bulyan" and min_sample_size < needed:
        raise FederationError(
            f"--strategy {choice} needs {needed} devices a round, --min_sample_size is "
            f"{min_sample_size}"
        )
    return strategy


def _find(choice: str) -> tuple[type[FlowerStrategy], str, str]:
    """Return the class that `choice` names, its name, and the text of its settings."""
    name, _, text = choice.partition(":")
    if name in STRATEGIES:
        return getattr(flwr.serverapp.strategy, name), name, text
    check_strategy(choice)
    module, class_name = name, text.partition(":")[0]
    cls = load_class("--strategy", module, class_name)
    if not (isinstance(cls, type) and issubclass(cls, FlowerStrategy)):
        raise FederationError(
            f"--strategy {choice}: {class_name} is no subclass of flwr.serverapp.strategy.Strategy"
        )
    if cls.start is not FlowerStrategy.start:
        raise FederationError(
            f"--strategy {choice}: {class_name} overrides start(), which is never called here; "
            "to save or show something after each round, write an observer (docs/architecture.md)"
        )
    return cls, class_name, text.partition(":")[2]


def _parse(
    text: str,
    choice: str,
    name: str,
    parameters: Mapping[str, inspect.Parameter],
    taken: set[str],
) -> dict[str, Any]:
    """Return the settings in "eta=0.02,tau=0.001"."""
    numbers = {
        key: type(p.default) if p.annotation is p.empty else p.annotation
        for key, p in parameters.items()
        if key not in taken
    }
    numbers = {key: kind for key, kind in numbers.items() if kind in (int, float)}
    settings = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        try:
            settings[key] = numbers[key](value)
            if not math.isfinite(settings[key]):
                raise ValueError
        except (KeyError, ValueError):
            raise FederationError(
                f"--strategy {choice}: '{item}' is not NAME=NUMBER; {name} has "
                f"{', '.join(numbers) or 'no settings'}"
            ) from None
    return settings

"""Flower's strategies on Updates: the same numbers as Flower's own, state, and users' classes."""

import copy
import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from federated.errors import FederationError
from federated.rounds import Device, NoModel
from federated.strategies import (
    STRATEGIES,
    Strategy,
    allow_messages,
    make_strategy,
    node_id,
    state_of_version_1,
    to_record,
)
from federated.updates import Weights, make_update
from tests.devices import small_model

SHIPPED = [*STRATEGIES]
DEVICES = [Device(str(i)) for i in range(5)]
CONFIG = {"lr": 0.1, "server_round": 1, "proximal_mu": 0.0}


def trained(seed: int, model: Weights) -> Weights:
    """Return weights as a device could send them."""
    rng = np.random.default_rng(seed)
    return {
        name: (array + rng.normal(0, 0.1, array.shape)).astype(array.dtype)
        if array.dtype.kind == "f"
        else np.asarray(array + seed, array.dtype)
        for name, array in model.items()
    }


def one_round(
    strategy: Strategy, model: Weights, server_round: int = 1, seed: int = 0, order: int = 1
) -> Weights:
    training = strategy.begin(server_round, model, CONFIG, DEVICES, str(seed))
    assert training
    jobs = training.jobs("job")
    for i, (device, job) in list(enumerate(jobs))[::order]:
        arrays = trained(100 * seed + int(device.cid), model)
        update = make_update(iter(arrays.values()), job.model, 10 + i, {"loss": 1.0 + i})
        training.add(device, update)
    return training.aggregate()


def floats(model: Weights) -> Weights:
    return {name: array for name, array in model.items() if array.dtype.kind == "f"}


def flowers_own(strategy: Strategy, model: Weights, server_round: int, seed: int = 0) -> Weights:
    """Return what Flower's class makes of all the replies, driven without our code."""
    allow_messages()
    flower = copy.deepcopy(strategy.flower)

    class Grid:
        def get_node_ids(self) -> list[int]:
            return [node_id(device.cid) for device in DEVICES]

    grid: Any = Grid()
    messages = list(flower.configure_train(server_round, to_record(model), ConfigRecord(), grid))
    cids = {node_id(device.cid): device.cid for device in DEVICES}
    # As our driver hands them over: by the device's name.
    messages.sort(key=lambda message: cids[message.metadata.dst_node_id])
    replies = []
    for message in messages:
        cid = int(cids[message.metadata.dst_node_id])
        content = RecordDict(
            {
                "arrays": to_record(floats(trained(100 * seed + cid, model))),
                "metrics": MetricRecord({"num-examples": 10, "train_loss": 1.0}),
            }
        )
        replies.append(Message(content, reply_to=message))
    record, _ = flower.aggregate_train(server_round, replies)
    assert record is not None
    return {name: np.asarray(array.numpy()) for name, array in record.items()}


@pytest.mark.parametrize("name", SHIPPED)
def test_each_strategy_gives_what_flowers_own_aggregation_gives(name: str) -> None:
    model = small_model()
    strategy = make_strategy(name, 1.0, 5)
    for server_round in (1, 2):
        expected = flowers_own(strategy, model, server_round)
        training = strategy.begin(server_round, model, CONFIG, DEVICES, "0")
        assert training
        for device, job in training.jobs("job"):
            arrays = trained(int(device.cid), model)
            training.add(device, make_update(iter(arrays.values()), job.model, 10, {"loss": 1.0}))
        new = training.aggregate()
        for key, array in expected.items():
            np.testing.assert_allclose(new[key], array, rtol=1e-5, atol=2e-6)
        assert list(new) == list(model)
        assert all(new[k].dtype == model[k].dtype for k in model)
        model = new


@pytest.mark.parametrize("name", SHIPPED)
def test_order_of_arrival_does_not_change_a_bit(name: str) -> None:
    one = one_round(make_strategy(name, 1.0, 5), small_model())
    other = one_round(make_strategy(name, 1.0, 5), small_model(), order=-1)
    assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", SHIPPED)
def test_counters_are_the_rounded_mean_and_keep_their_type(name: str) -> None:
    new = one_round(make_strategy(name, 1.0, 5), small_model())
    mean = sum((10 + i) * (3 + i) for i in range(5)) / sum(10 + i for i in range(5))
    assert new["n"].dtype == np.int64 and new["n"] == round(mean)


@pytest.mark.parametrize("name", SHIPPED)
def test_state_survives_a_checkpoint_bit_for_bit(name: str) -> None:
    undisturbed, model = make_strategy(name, 1.0, 5), small_model()
    before = one_round(undisturbed, model, 1)
    arrays, rest = undisturbed.state()
    resumed = make_strategy(name, 1.0, 5)
    resumed.load_state(arrays, json.loads(json.dumps(rest)))
    one, other = one_round(undisturbed, before, 2, seed=7), one_round(resumed, before, 2, seed=7)
    assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", SHIPPED)
def test_rolled_back_round_leaves_no_trace(name: str) -> None:
    model = small_model()
    undisturbed, disturbed = make_strategy(name, 1.0, 5), make_strategy(name, 1.0, 5)
    first = one_round(undisturbed, model, 1)
    one_round(disturbed, model, 1)
    training = disturbed.begin(2, first, CONFIG, DEVICES, "x")
    assert training
    for device, job in training.jobs("job"):
        arrays = [a + a.dtype.type(1e20 if a.dtype.kind == "f" else 1) for a in first.values()]
        training.add(device, make_update(iter(arrays), job.model, 10, {"loss": 1.0}))
    with np.errstate(all="ignore"):
        training.aggregate()
    training.roll_back()
    one, other = one_round(undisturbed, first, 2, 3), one_round(disturbed, first, 2, 3)
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_only_the_mean_is_kept_where_it_is_enough() -> None:
    enough = {name for name in SHIPPED if make_strategy(name, 1.0, 5).needs_only_mean}
    assert enough == {"FedAvg", "FedProx", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad"}


def test_fedprox_sends_its_mu_under_our_name() -> None:
    training = make_strategy("FedProx:proximal_mu=0.25", 1.0, 2).begin(
        4, small_model(), CONFIG, DEVICES
    )
    assert training
    assert training.jobs("job")[0][1].config["proximal_mu"] == 0.25
    assert training.jobs("job")[0][1].config["server_round"] == 4


def test_sampling_follows_the_seed() -> None:
    def chosen(seed: str) -> list[str]:
        training = make_strategy("FedAvg", 0.4, 1).begin(1, small_model(), CONFIG, DEVICES, seed)
        assert training
        return [device.cid for device, _ in training.jobs("job")]

    assert len(chosen("a")) == 2
    assert chosen("a") == chosen("a")
    assert len({tuple(chosen(str(i))) for i in range(20)}) > 1


def test_devices_with_different_metrics_are_aggregated() -> None:
    strategy, model = make_strategy("FedMedian", 1.0, 3), small_model()
    training = strategy.begin(1, model, CONFIG, DEVICES[:3])
    assert training
    reported: list[dict[str, Any]] = [
        {"loss": 1.0, "cpu_temperature": 50.0},
        {"loss": 2.0},
        {"loss": 3, "board": "Pi", "extra": 7},
    ]
    for (device, job), metrics in zip(training.jobs("job"), reported, strict=True):
        arrays = trained(1, model)
        training.add(device, make_update(iter(arrays.values()), job.model, 10, metrics))
    assert set(training.aggregate()) == set(model)


def test_qfedavg_without_losses_makes_no_model_and_names_the_reason() -> None:
    training = make_strategy("QFedAvg", 1.0, 1).begin(1, small_model(), CONFIG, DEVICES[:1])
    assert training
    [(device, job)] = training.jobs("job")
    arrays = trained(1, small_model())
    training.add(device, make_update(iter(arrays.values()), job.model, 10))
    with pytest.raises(NoModel, match="train_loss"):
        training.aggregate()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("FedFoo", "no strategy 'FedFoo'; there are FedAvg, FedProx"),
        ("FedOpt", "Flower has no FedOpt any more; use FedAdam"),
        ("FaultTolerantFedAvg", "use FedAvg"),
        ("FedAdam:eta", "'eta' is not NAME=NUMBER; FedAdam has eta, eta_l, beta_1, beta_2, tau"),
        ("FedAdam:eta=nan", "'eta=nan' is not NAME=NUMBER"),
        ("FedAvg:eta=1", "FedAvg has no settings"),
        ("nowhere:Mine", "--strategy nowhere:Mine: there is no nowhere.py in '"),
        ("json:Mine", "json.py has no Mine"),
        ("json:JSONDecoder", "JSONDecoder is no subclass of flwr.serverapp.strategy.Strategy"),
        ("Bulyan:num_malicious_nodes=1", "needs 7 devices a round, --min_sample_size is 5"),
    ],
)
def test_wrong_strategies_are_refused_in_one_line(choice: str, message: str) -> None:
    with pytest.raises(FederationError) as caught:
        make_strategy(choice, 1.0, 5)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a user's module into the working directory; return its name."""
    name = f"mine_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(
        textwrap.dedent(
            """
            from flwr.serverapp.strategy import FedAvg, Strategy

            class Slow(FedAvg):
                def __init__(self, alpha: float = 0.5, **kwargs):
                    super().__init__(**kwargs)
                    self.alpha = alpha
                    self.seen = []

                def configure_train(self, server_round, arrays, config, grid):
                    config["lr"] = config["lr"] * self.alpha
                    config["my-key"] = "mine"
                    return super().configure_train(server_round, arrays, config, grid)

                def aggregate_train(self, server_round, replies):
                    replies = list(replies)
                    self.seen.append(len(replies))
                    return super().aggregate_train(server_round, replies)

            class Starts(FedAvg):
                def start(self, *args, **kwargs):
                    return None

            class Greedy(FedAvg):
                def configure_train(self, server_round, arrays, config, grid):
                    self.min_available_nodes = 4
                    return super().configure_train(server_round, arrays, config, grid)

            class Lists(FedAvg):
                def configure_train(self, server_round, arrays, config, grid):
                    config["layers"] = [1, 2]
                    return super().configure_train(server_round, arrays, config, grid)

            class Fails(FedAvg):
                def aggregate_train(self, server_round, replies):
                    raise RuntimeError("not today")

            class Hoards(FedAvg):
                def __init__(self, **kwargs):
                    super().__init__(**kwargs)
                    self.file = None

                def aggregate_train(self, server_round, replies):
                    self.file = open("/dev/null")
                    return super().aggregate_train(server_round, replies)
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_users_strategy_gets_every_reply_and_its_settings_travel(mine: str) -> None:
    strategy = make_strategy(f"{mine}:Slow:alpha=0.25", 1.0, 5)
    assert not strategy.needs_only_mean
    training = strategy.begin(1, small_model(), CONFIG, DEVICES)
    assert training
    config = training.jobs("job")[0][1].config
    assert config["lr"] == pytest.approx(0.025) and config["my_key"] == "mine"
    one_round(strategy, small_model())
    assert strategy.flower.seen == [5]
    assert strategy.state()[1]["seen"] == [5]


def test_users_strategy_that_overrides_start_is_refused(mine: str) -> None:
    with pytest.raises(FederationError, match="overrides start"):
        make_strategy(f"{mine}:Starts")


def test_strategy_that_wants_more_devices_is_noticed_and_not_waited_for(mine: str) -> None:
    strategy = make_strategy(f"{mine}:Greedy", 1.0, 2)
    assert strategy.begin(1, small_model(), CONFIG, DEVICES[:3]) is None
    assert strategy.begin(1, small_model(), CONFIG, DEVICES[:4]) is not None


def test_settings_that_cannot_travel_are_named(mine: str) -> None:
    training = make_strategy(f"{mine}:Lists", 1.0, 2).begin(1, small_model(), CONFIG, DEVICES)
    assert training
    with pytest.raises(FederationError, match=r"sends the setting layers \[1, 2\]"):
        training.jobs("job")


def test_users_exception_is_no_new_model(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NoModel, match="Fails cannot aggregate: not today"):
        one_round(make_strategy(f"{mine}:Fails", 1.0, 5), small_model())
    assert "Traceback" in capsys.readouterr().err


def test_state_that_no_checkpoint_can_hold_is_named(mine: str) -> None:
    strategy = make_strategy(f"{mine}:Hoards", 1.0, 5)
    one_round(strategy, small_model())
    with pytest.raises(FederationError, match="keeps a TextIOWrapper in 'file'"):
        strategy.state()


def test_state_of_another_strategy_is_refused() -> None:
    strategy = make_strategy("FedAdam", 1.0, 5)
    one_round(strategy, small_model())
    with pytest.raises(FederationError, match="state of another strategy than FedAvg"):
        make_strategy("FedAvg", 1.0, 5).load_state(*strategy.state())


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedYogi", "FedAdagrad"])
def test_state_of_an_older_release_is_read(name: str) -> None:
    strategy, model = make_strategy(name, 1.0, 5), small_model()
    model = floats(model)
    new = one_round(strategy, model)
    arrays, _ = strategy.state()
    numbers = {key: str(i) for i, key in enumerate(model)}
    old = {
        "/".join([path.split("/")[0], numbers.get(path.split("/")[1], path.split("/")[1])]): array
        for path, array in arrays.items()
    }
    resumed = make_strategy(name, 1.0, 5)
    resumed.load_state(old, state_of_version_1(old, list(model)))
    one, other = one_round(strategy, new, 2, 5), one_round(resumed, new, 2, 5)
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_no_copy_of_the_weights_is_made_for_fedavg() -> None:
    training = make_strategy("FedAvg", 1.0, 2).begin(1, small_model(), CONFIG, DEVICES)
    assert training and isinstance(training.arrays, ArrayRecord) and not training.arrays
    assert type(make_strategy("FedAvg").flower) is FedAvg

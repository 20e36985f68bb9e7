"""plumbing/stream/fleet.py and plumbing/stream/device.py against each other, over real gRPC."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import flwr.server.strategy
import grpc
import numpy as np
import pytest
from flwr.common import Parameters

import server
from federated.errors import FederationError, Refused
from plumbing.stream import device as transport
from plumbing.stream import wire
from plumbing.stream.fleet import Device, Fleet, Reply

WEIGHTS = [np.zeros((3, 2), np.float32), np.ones(4, np.float32)]
NAMES = ["a", "b"]


class Adder:
    """Adds `step` to each weight, and claims to have seen `num_examples` images."""

    def __init__(self, cid: str, step: float = 1.0, num_examples: int = 10) -> None:
        self.cid = cid
        self.step = step
        self.num_examples = num_examples
        self.connections = 0

    def get_properties(self, config):
        return {"cid": self.cid, "greeted_with": config["seed"]}

    def fit(self, parameters, config):
        new = [np.asarray(p + self.step, p.dtype) for p in parameters]
        return new, self.num_examples, {"proximal_mu": config.get("proximal_mu", -1.0)}

    def serve(self, address: str, max_wait_seconds: float | None = 20) -> None:
        def note(state: str) -> None:
            self.connections += state.startswith("connected")

        transport.serve(address, self, note, max_wait_seconds)


@pytest.fixture
def join() -> Iterator[Callable[..., threading.Thread]]:
    threads: list[threading.Thread] = []

    def start(client: Adder, fleet: Fleet) -> threading.Thread:
        def serve() -> None:
            with contextlib.suppress(FederationError):  # its fleet is closed before it is back
                client.serve(fleet.address)

        threads.append(threading.Thread(target=serve, daemon=True))
        threads[-1].start()
        return threads[-1]

    yield start


def fit_request(config=None) -> bytes:
    return wire.encode_fit(WEIGHTS, config or {})


def test_devices_join_train_and_end_with_the_run(open_fleet, join, told):
    fleet = open_fleet()
    threads = [join(Adder(str(cid), step=cid + 1), fleet) for cid in range(3)]
    assert fleet.wait_for(3, timeout=10)
    assert sorted(told) == ["device 0 joined", "device 1 joined", "device 2 joined"]
    assert fleet.all()["1"].properties == {"cid": "1", "greeted_with": 7}

    requests = [(device, fit_request()) for device in fleet.all().values()]
    for reply in fleet.exchange(requests):
        weights, num_examples, _ = wire.decode_fit_reply(reply.data)
        np.testing.assert_array_equal(weights[0], WEIGHTS[0] + int(reply.device.cid) + 1)
        assert num_examples == 10

    fleet.close(run_is_over=True)
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert len(told) == 3  # nobody "left": the run was over


def test_all_devices_train_at_the_same_time(open_fleet, join):
    together = threading.Barrier(20)

    class Meeting(Adder):
        def fit(self, parameters, config):
            together.wait(10)  # breaks, and with it the round, unless all are here
            return super().fit(parameters, config)

    fleet = open_fleet()
    for cid in range(20):
        join(Meeting(str(cid)), fleet)
    assert fleet.wait_for(20, timeout=20)
    requests = [(device, fit_request()) for device in fleet.all().values()]
    assert all(reply.data for reply in fleet.exchange(requests))


def test_second_device_with_a_cid_is_refused_and_the_first_stays(open_fleet, join, told):
    fleet = open_fleet(keepalive_seconds=0.5)
    join(Adder("0"), fleet)
    assert fleet.wait_for(1, timeout=10)
    with pytest.raises(Refused, match="a device with --cid=0 is connected already; give each its"):
        Adder("0").serve(fleet.address)
    assert any(event.startswith("refused device 0: a device with --cid=0") for event in told)
    (reply,) = fleet.exchange([(fleet.all()["0"], fit_request())])
    assert reply.data


def test_device_that_comes_back_takes_its_place_again(open_fleet, join, told):
    fleet = open_fleet()
    with grpc.insecure_channel(fleet.address) as channel:
        stream = channel.stream_stream(transport.JOIN)(
            iter([wire.encode_properties_reply({"cid": "0"})])
        )
        next(stream)
        assert fleet.wait_for(1, timeout=10)
        ghost = fleet.all()["0"]
    join(Adder("0"), fleet)
    deadline = time.monotonic() + 10
    while fleet.all().get("0") in (None, ghost) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told == ["device 0 joined", "device 0 left", "device 0 joined"]
    (reply,) = fleet.exchange([(ghost, fit_request())])
    assert (reply.data, reply.problem) == (None, "the connection broke")


def test_reason_for_a_refusal_reaches_the_device(open_fleet, told):
    fleet = open_fleet(admit=lambda properties: "no room, come to the other kitchen")
    with pytest.raises(Refused, match="no room, come to the other kitchen"):
        Adder("0").serve(fleet.address)
    assert told == ["refused device 0: no room, come to the other kitchen"]


@pytest.mark.parametrize("cid", ["../../x", "a\nb", "", "x" * 65, "ü"])
def test_cid_that_is_no_name_is_refused(open_fleet, told, cid):
    fleet = open_fleet()
    with pytest.raises(Refused, match="is not made of 1 to 64 letters"):
        Adder(cid).serve(fleet.address)
    assert "\n" not in told[0]


@pytest.mark.parametrize("greeting", [b"", b"\xff\xff\xff", wire.encode_fit_reply([], 1, {})])
def test_client_that_answers_nonsense_is_refused(open_fleet, told, greeting):
    fleet = open_fleet()
    with grpc.insecure_channel(fleet.address) as channel:
        stream = channel.stream_stream(transport.JOIN)(iter([greeting]))
        with pytest.raises(grpc.RpcError) as error:
            list(stream)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "it did not say what it is" in told[0]
    assert fleet.num_available() == 0


def test_reply_far_larger_than_the_model_is_refused_before_it_is_read(open_fleet, join, capsys):
    class Braggart(Adder):
        def fit(self, parameters, config):
            return [np.zeros(1_000_000, np.float32)], 10, {}

    fleet = open_fleet(model_bytes=1000)
    join(Braggart("0"), fleet)
    reasons = ["the connection broke"]
    while reasons[-1] == "the connection broke":  # again if it has not been missed yet
        assert fleet.wait_for(1, timeout=10)
        _, record = server.run_round(1, WEIGHTS, NAMES, make_strategy("FedAvg", 1), fleet)
        reasons.append(record["dropped"][0]["reason"])
    assert len(reasons) > 2
    assert "its reply is too large: Received message larger than max" in reasons[-1]


def test_sample_is_repeatable_and_independent_of_who_came_first(open_fleet, join):
    draws = []
    for order in ("abcdef", "fedcba"):
        fleet = open_fleet()
        for i, cid in enumerate(order, 1):
            join(Adder(cid), fleet)
            assert fleet.wait_for(i, timeout=10)
        fleet.random.seed("5 1")
        draws.append([device.cid for device in fleet.sample(3)])
        fleet.close(run_is_over=True)
    assert draws[0] == draws[1]
    assert len(set(draws[0])) == 3


def test_no_host_of_that_name_ends_the_client():
    with pytest.raises(FederationError, match=r"cannot find the host 'no\.such\.host\.invalid'"):
        Adder("0").serve("no.such.host.invalid:8080")


def test_device_that_joins_while_the_run_ends_is_told_so_too(open_fleet, join, told):
    class Slow(Adder):
        def get_properties(self, config):
            asked.set()
            time.sleep(1)
            return super().get_properties(config)

    asked = threading.Event()
    fleet = open_fleet()
    thread = join(Slow("0"), fleet)
    assert asked.wait(10)
    fleet.close(run_is_over=True)
    thread.join(5)
    assert not thread.is_alive()
    assert told == []


def test_refusal_of_any_length_and_lettering_arrives(open_fleet, told):
    fleet = open_fleet(admit=lambda properties: "no\n\033[31m" + "x" * 30_000)
    with pytest.raises(Refused, match="no"):
        Adder("0").serve(fleet.address)
    assert told[0].isprintable()


# --- A round --------------------------------------------------------------------------


def make_strategy(choice: str, clients: int):
    return server.make_strategy(
        choice,
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_fit_clients=clients,
        min_evaluate_clients=clients,
        min_available_clients=clients,
        on_fit_config_fn=lambda server_round: {"server_round": server_round},
        evaluate_fn=lambda server_round, weights, config: (1.0, {}),
        fit_metrics_aggregation_fn=lambda metrics: {},
        initial_parameters=Parameters([wire.pack_array(w) for w in WEIGHTS], wire.TENSOR_TYPE),
    )


def test_round_averages_by_examples(open_fleet, join):
    fleet = open_fleet()
    join(Adder("0", step=1, num_examples=30), fleet)
    join(Adder("1", step=5, num_examples=10), fleet)
    fleet.wait_for(2, timeout=10)
    new, record = server.run_round(1, WEIGHTS, NAMES, make_strategy("FedAvg", 2), fleet)
    by_hand = (30 * 1 + 10 * 5) / 40
    for before, after in zip(WEIGHTS, new, strict=True):
        np.testing.assert_allclose(after, before + by_hand, rtol=1e-6)
        assert after.dtype == np.float32
    assert [device["num_examples"] for device in record["devices"]] == [30, 10]
    assert record["dropped"] == []


@pytest.mark.parametrize(
    ("step", "num_examples", "reason"),
    [
        (np.nan, 10, "a has 6 non-finite values"),
        (np.inf, 10, "a has 6 non-finite values"),
        (1.0, 0, "trained on 0 examples"),
        (1.0, -5, "trained on -5 examples"),
        (1.0, 2**62, "trained on 4611686018427387904 examples"),
    ],
)
def test_bad_reply_is_dropped_by_name_and_the_others_count(
    open_fleet, join, capsys, step, num_examples, reason
):
    fleet = open_fleet()
    join(Adder("0"), fleet)
    join(Adder("1", step, num_examples), fleet)
    fleet.wait_for(2, timeout=10)
    new, record = server.run_round(3, WEIGHTS, NAMES, make_strategy("FedAvg", 2), fleet)
    np.testing.assert_allclose(new[0], WEIGHTS[0] + 1)
    assert record["dropped"] == [{"name": "device 1", "reason": reason}]
    assert f"round 3: dropped device 1: {reason}" in capsys.readouterr().out


def test_round_without_any_usable_reply_leaves_the_model_alone(open_fleet, join):
    fleet = open_fleet()
    join(Adder("0", step=np.nan), fleet)
    fleet.wait_for(1, timeout=10)
    new, record = server.run_round(1, WEIGHTS, NAMES, make_strategy("FedAvg", 1), fleet)
    assert new is None
    assert len(record["dropped"]) == 1


@pytest.mark.parametrize("name", server.STRATEGIES)
def test_each_strategy_runs_and_follows_its_devices(open_fleet, join, name):
    fleet = open_fleet()
    for cid in range(5):
        join(Adder(str(cid), step=0.1), fleet)
    fleet.wait_for(5, timeout=10)
    strategy = make_strategy(name, 5)
    assert type(strategy).__name__ == name
    weights = WEIGHTS
    for server_round in (1, 2, 3):
        weights, record = server.run_round(server_round, weights, NAMES, strategy, fleet)
        assert len(record["devices"]) == 5
    for before, after in zip(WEIGHTS, weights, strict=True):
        assert after.shape == before.shape
        assert after.dtype == before.dtype
        assert np.isfinite(after).all()
        assert (after > before).all()  # all devices went up
    if name == "FedProx":
        assert record["devices"][0]["metrics"]["proximal_mu"] == 0.01


def test_strategies_from_the_weighted_mean_equal_flowers_own_on_all_replies():
    """The mean shown as one device's reply gives what Flower computes from all of them."""
    rng = np.random.default_rng(0)
    updates = [[w + rng.normal(size=w.shape).astype("f") for w in WEIGHTS] for _ in range(4)]
    counts = [10, 20, 30, 40]

    class StubFleet:
        """Stands in for devices: hands the updates over, in an order of its own."""

        gate = None

        def __init__(self):
            self.devices = [Device(str(i), {}) for i in range(4)]

        def num_available(self):
            return 4

        def sample(self, num_clients, min_num_clients):
            return self.devices

        def exchange(self, requests, round_id, timeout):
            for i in (2, 0, 3, 1):
                data = wire.encode_fit_reply(updates[i], counts[i], {})
                yield Reply(self.devices[i], data)

    for name in set(server.STRATEGIES) - server.NEED_ALL_UPDATES:
        ours, theirs = make_strategy(name, 4), make_strategy(name, 4)
        weights = WEIGHTS
        for server_round in (1, 2):
            weights, _ = server.run_round(server_round, weights, NAMES, ours, StubFleet())
            results = [
                (None, flwr.common.FitRes(None, flwr.common.ndarrays_to_parameters(u), n, {}))
                for u, n in zip(updates, counts, strict=True)
            ]
            expected, _ = theirs.aggregate_fit(server_round, results, [])
        for a, b in zip(weights, flwr.common.parameters_to_ndarrays(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)

"""Bad replies, over real sockets: each is dropped with its reason, and the model is untouched.

One real server.py, and devices that send raw bytes. Some reply as a stock Flower client does,
with the weights; others as client.py does, with an offer and then the weights. LONG=1 puts
10,000 mutated or random messages through the round instead of 200; tests/fuzz puts far more
through what decodes them.
"""

import contextlib
import gc
import json
import pickle
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import grpc
import numpy as np
import pytest
from flwr.common import bytes_to_ndarray
from flwr.proto.transport_pb2 import ClientMessage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import utils
from federated.errors import FederationError
from federated.rounds import Plan, Step, synchronous
from federated.strategies import make_strategy
from plumbing.report import step_record
from plumbing.stream import wire
from plumbing.stream.device import JOIN
from plumbing.stream.fleet import read_reply
from plumbing.stream.session import Reply, Work
from tests.conftest import LONG
from tests.devices import MemoryFleet, Recorder, greeting

CLASSES = json.dumps([f"pattern {i}" for i in range(10)])  # of the synthetic images
STOCK_SAYS = "averaged into the model, or the server hangs for ever"


class RawDevice:
    """A device whose every message is given: a thread, a socket, and what it answers.

    Args:
        answer: maps a request to the bytes of the reply, or to None for silence.
        flood: messages that nobody asked for, sent after the greeting.
        properties: what it reports of itself besides its name, model and classes.
    """

    def __init__(
        self,
        address: str,
        cid: str,
        answer: Callable[[wire.Request], bytes | None],
        flood: list[bytes] | None = None,
        **properties: object,
    ) -> None:
        self.cid = cid
        self.answer = answer
        self.flood = flood or []
        self.properties = greeting(cid, model="Net", classes=CLASSES, **properties)
        self.error: grpc.RpcError | None = None
        self.thread = threading.Thread(target=self._run, args=(address,), daemon=True)
        self.thread.start()

    def _run(self, address: str) -> None:
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
        ]
        with grpc.insecure_channel(address, options) as channel:
            ready = threading.Event()
            replies: list[bytes | None] = []

            def outgoing() -> Iterator[bytes]:
                while True:
                    ready.wait()
                    while replies:
                        message = replies.pop(0)
                        if message is None:
                            return
                        yield message
                    ready.clear()

            stream = channel.stream_stream(JOIN)(outgoing())
            try:
                for data in stream:
                    request = wire.decode_request(data)
                    if request.kind == "get_properties":
                        replies += [wire.encode_properties_reply(self.properties), *self.flood]
                    elif request.kind == "reconnect":
                        replies += [wire.encode_done_reply(False), None]
                    elif (reply := self.answer(request)) is not None:
                        replies.append(reply)
                    ready.set()
            except grpc.RpcError as error:
                self.error = error
            replies.append(None)
            ready.set()


def initial_weights() -> list[np.ndarray]:
    return list(utils.get_weights(utils.build_model("Net")).values())


def npy(array: np.ndarray) -> bytes:
    return wire.pack_array(array)


def fit_reply(tensors: list[bytes], num_examples: int = 10) -> bytes:
    message = ClientMessage()
    message.fit_res.status.message = ""
    message.fit_res.num_examples = num_examples
    message.fit_res.parameters.tensors.extend(tensors)
    message.fit_res.parameters.tensor_type = wire.TENSOR_TYPE
    return message.SerializeToString()


def parameters_reply(tensors: list[bytes]) -> bytes:
    message = ClientMessage()
    message.get_parameters_res.status.message = ""
    message.get_parameters_res.parameters.tensors.extend(tensors)
    return message.SerializeToString()


def pickled_objects() -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    content = pickle.dumps(np.array([{"never": "unpickled"}], object))
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + content


def headed(shape: str, descr: str = "<f4") -> bytes:
    """Return one float32 with an .npy header that gives it any `shape` and type."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n"
    header = header.encode("latin-1")
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(4)


def bad_tensors() -> dict[str, tuple[list[bytes], str]]:
    """Return, for each kind of bad weights, the packed arrays and the expected reason."""
    good = [npy(w) for w in initial_weights()]
    first, bias = initial_weights()[0], initial_weights()[1]
    nan, inf = first.copy(), first.copy()
    nan.flat[3] = np.nan
    inf.flat[:2] = np.inf
    rest = good[1:]
    return {
        "NaN": ([npy(nan), *rest], "conv1.weight has 1 non-finite values"),
        "infinity": ([npy(inf), *rest], "conv1.weight has 2 non-finite values"),
        "one array less": (good[:-1], "9 arrays for a model that has 10"),
        "without the first array": (rest, "conv1.weight is float32 (6,), not float32 (6, 3, 5, 5)"),
        "one array more": ([*good, npy(bias)], "11 arrays for a model that has 10"),
        "no arrays": ([], "0 arrays for a model that has 10"),
        "another shape": (
            [npy(first.reshape(-1, 25)), *rest],
            "conv1.weight is float32 (18, 25), not float32 (6, 3, 5, 5)",
        ),
        "a shape that NumPy would broadcast": (
            [good[0], npy(bias[:1]), *good[2:]],
            "conv1.bias is float32 (1,), not float32 (6,)",
        ),
        "float64": ([npy(first.astype("f8")), *rest], "conv1.weight is float64 (6, 3, 5, 5)"),
        "int64": ([npy(first.astype("i8")), *rest], "conv1.weight is int64 (6, 3, 5, 5)"),
        "big-endian": ([npy(first.astype(">f4")), *rest], "conv1.weight is >f4 (6, 3, 5, 5)"),
        "strings": ([npy(np.full(first.shape, "1.0")), *rest], "conv1.weight is <U3"),
        "pickled objects": ([pickled_objects(), *rest], "type object"),
        "bytes that are no array": ([b"x" * 2000, *rest], "an array's header takes"),
        "half of an array": ([good[0][:1000], *rest], "872 bytes for an array of shape"),
        "an array of no bytes": ([b"", *rest], "an array"),
        "True for a size": ([headed("(True,)"), *rest], "'shape': (True,)"),
        "an escape code as its type": (
            [headed("(1,)", "<0f4\x9b2J"), *rest],
            r"{'descr': '<0f4\x9b2J'",
        ),
        "70 dimensions": ([headed(f"({', '.join('1' * 70)})"), *rest], "an array of 70 dimensions"),
    }


def bad_replies() -> dict[str, tuple[bytes, str]]:
    """Return, for each kind of bad fit reply beyond its arrays, its bytes and the reason."""
    good = [npy(w) for w in initial_weights()]
    huge = wire.encode_fit_reply([np.zeros(500_000, np.float32)], 10, {})
    return {
        "no examples": (fit_reply(good, 0), "trained on 0 examples"),
        "negative examples": (fit_reply(good, -5), "trained on -5 examples"),
        "2^62 examples": (fit_reply(good, 2**62), "trained on 4611686018427387904 examples"),
        "num_examples of another type": (
            # field 3 of FitRes as a double: protobuf does not know it
            fit_reply(good, 0) + b"\x22\x09\x19" + np.float64(10).tobytes(),
            "trained on 0 examples",
        ),
        "an empty reply": (b"", "a message of type None, not fit_res"),
        "noise": (b"\xff" * 500, "500 bytes that are no Flower message"),
        "half of a message": (fit_reply(good)[:100_000], "bytes that are no Flower message"),
        "another message": (wire.encode_properties_reply({}), "a message of type get_properties"),
        "a reply eight times the model": (huge, "it sent a message that is too large"),
    }


def offer(request: wire.Request, num_examples: int = 10) -> bytes:
    round_id = str(request.config[wire.ROUND_ID])
    return wire.encode_fit_reply([], num_examples, {wire.ROUND_ID: round_id})


def whole(reply: bytes) -> Callable[[wire.Request], bytes]:
    """Answer as a stock client does."""
    return lambda request: reply


def offered(parameters: bytes | None, num_examples: int = 10) -> Callable[..., bytes | None]:
    """Answer as client.py does."""

    def answer(request: wire.Request) -> bytes | None:
        return parameters if request.kind == "get_parameters" else offer(request, num_examples)

    return answer


def good_devices(address: str) -> list[RawDevice]:
    """Start three devices whose mean is known: two offer their weights, one sends them."""
    one, two = plus(1), plus(2)
    return [
        RawDevice(address, "good-1", offered(wire.encode_parameters_reply(one), 10)),
        RawDevice(address, "good-2", whole(wire.encode_fit_reply(two, 30, {}))),
        RawDevice(address, "good-3", offered(wire.encode_parameters_reply(one), 10)),
    ]


def plus(step: int) -> list[np.ndarray]:
    return [w + np.float32(step) for w in initial_weights()]


def mean_of_the_good() -> list[np.ndarray]:
    """Return the mean of `good_devices`, from exact fractions of a few weights and float64."""
    means = []
    for one, two in zip(plus(1), plus(2), strict=True):
        mean = ((20 * one.astype("f8") + 30 * two.astype("f8")) / 50).astype(np.float32)
        exact = (20 * Fraction(float(one.flat[0])) + 30 * Fraction(float(two.flat[0]))) / 50
        assert mean.flat[0] == np.float32(float(exact))
        means.append(mean)
    return means


def read_run(run_dir: Path) -> tuple[list[np.ndarray], list[dict]]:
    from safetensors.numpy import load_file

    weights = load_file(run_dir / "model.safetensors")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [weights[n] for n in utils.build_model("Net").state_dict()], [*map(json.loads, lines)]


def assert_same_bits(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def all_bad() -> dict[str, tuple[Callable[[wire.Request], bytes | None], str]]:
    kinds: dict[str, tuple[Callable[[wire.Request], bytes | None], str]] = {}
    for name, (tensors, reason) in bad_tensors().items():
        if tensors:  # a fit reply without arrays is below, as an offer of another round
            kinds[f"{name}, sent"] = (whole(fit_reply(tensors)), reason)
        kinds[f"{name}, offered"] = (offered(parameters_reply(tensors)), reason)
    for name, (reply, reason) in bad_replies().items():
        kinds[f"{name}, sent"] = (whole(reply), reason)
    good = parameters_reply([npy(w) for w in initial_weights()])
    kinds |= {
        "an offer of no examples": (offered(good, 0), "trained on 0 examples"),
        "an offer, then nothing in it": (offered(b""), "a message of type None"),
        "an offer, then noise": (offered(b"\xff" * 99), "99 bytes that are no Flower message"),
        "an offer, then an offer": (
            offered(wire.encode_fit_reply([], 10, {})),
            "a message of type fit_res, not get_parameters_res",
        ),
        "an offer, then eight times the model": (
            offered(wire.encode_parameters_reply([np.zeros(500_000, np.float32)])),
            "it sent a message that is too large",
        ),
        "an offer for another round": (
            whole(wire.encode_fit_reply([], 10, {wire.ROUND_ID: "another"})),
            "0 arrays for a model that has 10",
        ),
        "a failure": (whole(wire.encode_fit_failure("out of memory")), "train: out of memory"),
    }
    return kinds


def test_each_bad_reply_is_dropped_with_its_reason_and_the_model_is_the_mean_of_the_good(
    start_server, tmp_path, record_fault
):
    kinds = all_bad()
    count = str(len(kinds) + 3)
    server_process, address = start_server(
        rounds="1", min_num_clients=count, min_sample_size=count, num_partitions=count
    )
    good = good_devices(address)
    for number, (answer, _) in enumerate(kinds.values()):
        RawDevice(address, f"bad-{number}", answer)
    assert server_process.finish() == 0, server_process.output
    found, (metrics,) = read_run(tmp_path / "run")
    assert_same_bits(found, mean_of_the_good())
    assert [d["name"] for d in metrics["devices"]] == [f"device {d.cid}" for d in good]
    reasons = {drop["name"]: drop["reason"] for drop in metrics["dropped"]}
    for number, (kind, (_, reason)) in enumerate(kinds.items()):
        shown = reasons[f"device bad-{number}"]
        assert reason in shown, f"{kind}: {shown!r}, not {reason!r}"
        assert f"round 1: dropped device bad-{number}: {shown}" in server_process.output
    assert "\x9b" not in server_process.output
    for device in good:
        assert device.error is None
    record_fault(
        f"bad replies, {len(kinds)} kinds, sent whole or offered first",
        "raw bytes over the socket, all in one round with 3 good devices",
        "each dropped by name with its reason; the model is bit for bit the mean of the good",
        None,
        STOCK_SAYS,
    )


def test_odd_metrics_do_no_harm(start_server, tmp_path, record_fault):
    def answer(metrics: dict) -> Callable[[wire.Request], bytes]:
        return whole(wire.encode_fit_reply(plus(1), 10, metrics))

    odd = ClientMessage.FromString(wire.encode_fit_reply(plus(1), 10, {}))
    odd.fit_res.metrics["a type to come"].ParseFromString(b"\x7a\x03new")  # field 15
    kinds = [
        answer({"loss": float("nan"), "seconds": float("-inf")}),
        answer({"board": "x" * 500_000, "loss": 2.5}),
        answer({"x" * 50_000: 1}),
        answer({f"m{i}": i for i in range(5_000)}),
        answer({"raw": b"\0\xff" * 100, "\x1b[2J": 3, "big": -(2**63)}),
        whole(odd.SerializeToString()),
    ]
    count = str(len(kinds))
    server_process, address = start_server(
        rounds="2", min_num_clients=count, min_sample_size=count, num_partitions=count
    )
    for number, reply in enumerate(kinds):
        RawDevice(address, f"odd-{number}", reply)
    assert server_process.finish() == 0, server_process.output
    found, lines = read_run(tmp_path / "run")
    assert_same_bits(found, plus(1))
    assert "\x1b" not in server_process.output
    assert len(server_process.output) < 10_000
    for line in lines:
        assert line["dropped"] == []
        devices = {d["name"]: d["metrics"] for d in line["devices"]}
        assert "loss" not in devices["device odd-0"]
        assert devices["device odd-1"] == {"loss": 2.5}
        assert len(devices["device odd-3"]) == 100
        assert devices["device odd-4"] == {"big": -(2**63)}
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size < 50_000
    record_fault(
        "odd metrics",
        "NaN, 500 kB of text, 5,000 entries, escape codes, an unknown type",
        "the updates count; what cannot go into a table is left out",
    )


def test_update_far_away_is_dropped_beyond_the_operators_limit(
    start_server, tmp_path, record_fault
):
    server_process, address = start_server(
        rounds="1",
        min_num_clients="4",
        min_sample_size="4",
        max_update_norm=str(2.1 * 62_006**0.5),  # 2 in each weight passes, 3 does not
    )
    good_devices(address)
    RawDevice(address, "far", offered(wire.encode_parameters_reply(plus(3)), 10))
    assert server_process.finish() == 0, server_process.output
    found, (metrics,) = read_run(tmp_path / "run")
    assert_same_bits(found, mean_of_the_good())
    (drop,) = metrics["dropped"]
    assert drop["name"] == "device far"
    assert drop["reason"] == (
        "its update has norm 747, above the limit of 523; --max_update_norm sets another limit"
    )
    record_fault(
        "an update far from the model",
        "3 added to each weight, --max_update_norm set to 2.1 in each",
        "dropped with its distance and the limit",
        None,
        "averaged into the model",
    )


def resident_bytes(pid: int) -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def test_flood_that_nobody_asked_for_stays_in_the_network(start_server, tmp_path, record_fault):
    server_process, address = start_server(
        rounds="1", min_num_clients="4", min_sample_size="4", num_partitions="4"
    )
    before = resident_bytes(server_process.popen.pid)
    one = wire.encode_fit_reply(plus(9), 10, {})  # 250 kB
    flooders = [
        RawDevice(address, f"flood-{i}", offered(b""), [b"\xff" * 1000] + [one] * 400)
        for i in range(3)
    ]
    server_process.wait_for("3 connected")
    time.sleep(3)  # 300 MB could come in meanwhile
    during = resident_bytes(server_process.popen.pid)
    good = RawDevice(address, "good", offered(wire.encode_parameters_reply(plus(1))))
    assert server_process.finish() == 0, server_process.output
    assert good.error is None
    # The first of a flood is what it answered the fit with: it is the noise.
    found, (metrics,) = read_run(tmp_path / "run")
    assert_same_bits(found, plus(1))
    assert {d["name"] for d in metrics["dropped"]} == {f"device flood-{i}" for i in range(3)}
    assert during - before < 40e6, f"{before / 1e6:.0f} MB before, {during / 1e6:.0f} MB during"
    for flooder in flooders:
        flooder.thread.join(10)
        assert not flooder.thread.is_alive()
    record_fault(
        "messages that nobody asked for",
        "3 devices send 400 updates of 250 kB each",
        f"they stay unread: the server grew by {(during - before) / 1e6:.0f} MB",
        None,
        "read and kept: 30 of 45 MB took 1.6 GB",
    )


# --- Any bytes ------------------------------------------------------------------------

WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([0.5, -0.5])}
UPDATE = [w + np.float32(1) for w in WEIGHTS.values()]
GOOD = wire.encode_fit_reply(UPDATE, 10, {"loss": 1.5, "board": "Pi"})
GOOD_PARAMETERS = wire.encode_parameters_reply(UPDATE)
OFFER = wire.encode_fit_reply([], 10, {wire.ROUND_ID: "r"})

places = st.tuples(st.integers(0, 2**16), st.integers(0, 255))


def mutate(message: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy that draws the message with bytes changed, cut out and put in."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> bytes:
        data = bytearray(message)
        for place, value in draw(st.lists(places, max_size=6)):
            data[place % len(data)] = value
        start, end = (draw(st.integers(0, len(data))) for _ in range(2))
        if draw(st.booleans()):
            data[start:end] = draw(st.binary(max_size=30))
        return bytes(data)

    return draw_one()


class Handed(MemoryFleet):
    """Devices whose answers are bytes, and pieces of weights that follow an offer."""

    def give(self, device, job, answer):
        data, pieces = answer
        work = Work(device, job, wire.WeightsRequest([*job.model.values()], {}))
        whole = wire.Chunk(0, len(job.model), 0)  # what was asked for
        chunks = [(whole, piece) for piece in pieces]
        self.events.append(read_reply(Reply(work, data, chunks=chunks)))


def one_round(fleet, model: dict[str, np.ndarray], **plan) -> Step:
    plan = Plan(
        rounds=1,
        config=lambda _: {},
        evaluate=lambda _: {"loss": 1.0},
        job_id=lambda _: "r",
        **plan,
    )
    (step,) = synchronous(fleet, make_strategy("FedAvg"), model, plan)
    return step


def read_by_protobuf(data: bytes, pieces: list[bytes]) -> tuple[list[np.ndarray], int]:
    """Return weights and number of examples as protobuf and Flower read them, not we."""
    reply = ClientMessage.FromString(data).fit_res
    tensors = [*reply.parameters.tensors]
    for piece in pieces:
        tensors += ClientMessage.FromString(piece).get_parameters_res.parameters.tensors
    return [bytes_to_ndarray(tensor) for tensor in tensors], reply.num_examples


@settings(
    max_examples=10_000 if LONG else 200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    st.one_of(
        st.tuples(mutate(GOOD), st.just([])),
        st.tuples(st.binary(max_size=400), st.just([])),
        st.tuples(st.just(OFFER), st.lists(mutate(GOOD_PARAMETERS), min_size=1, max_size=2)),
        st.tuples(mutate(OFFER), st.lists(st.binary(max_size=100), max_size=2)),
    )
)
def test_no_bytes_crash_a_round_or_move_the_model_beyond_a_valid_update(message):
    data, pieces = message
    fleet = Handed({"bad": lambda job: message, "good": lambda job: (GOOD, [])})
    step = one_round(fleet, WEIGHTS, min_num_clients=2, min_sample_size=2, retries=1)
    record = step_record(step)
    names = [device["name"] for device in record["devices"]]
    assert "device good" in names
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    expected = UPDATE
    if "device bad" in names:  # the change left it a whole, plausible update: it counts as one
        arrays, num_examples = read_by_protobuf(data, pieces)
        expected = [
            ((10 * u.astype("f8") + num_examples * a.astype("f8")) / (10 + num_examples))
            for u, a in zip(UPDATE, arrays, strict=True)
        ]
    for (name, before), aim in zip(WEIGHTS.items(), expected, strict=True):
        after = step.weights[name]
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        assert np.isfinite(after).all()
        np.testing.assert_allclose(after, aim, rtol=1e-6, atol=1e-7)


def test_hung_device_does_not_keep_the_weights_of_its_round(open_fleet):
    recorder = Recorder(fleet := open_fleet(model_bytes=1000))
    hung = RawDevice(fleet.address, "0", lambda request: None)
    (device,) = recorder.wait_for(1)
    model = {"w": np.zeros(100)}
    kept = weakref.ref(model["w"])
    with contextlib.suppress(FederationError):  # nobody has replied
        one_round(fleet, model, timeout=1)
    del model
    recorder.until(lambda: gc.collect() + 1 and kept() is None, 0.8)
    assert device.state == "late"
    recorder.until(lambda: device.state == "gone")  # it is hung up on
    hung.thread.join(20)
    assert not hung.thread.is_alive()


@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_large_model_arrives_whole_or_in_pieces(in_pieces, monkeypatch, open_fleet):
    """Weights of several pieces, to a device that takes them so and to one that does not."""
    for name in ("PIECE_BYTES", "ONE_CHUNK_BYTES", "CHUNK_BYTES", "FIRST_CHUNK_BYTES"):
        monkeypatch.setattr(wire, name, 1000)
    rng = np.random.default_rng(0)
    model = {f"w{n}": rng.normal(size=n).astype("f") for n in (100, 700, 3, 200, 40, 110)}
    received: list[np.ndarray] = []
    messages: list[str] = []

    def answer(request: wire.Request) -> bytes | None:
        messages.append(request.kind)
        if request.kind == "fit":
            received.extend(request.weights)
            return None if request.config.get(wire.MORE) else offer(request)
        first, count = request.config[wire.FIRST], request.config[wire.COUNT]
        trained = [array + np.float32(1) for array in received[-len(model) :]]
        which_bytes = (request.config.get(wire.SKIP, 0), request.config.get(wire.TAKE))
        return wire.encode_parameters_reply(trained[first : first + count], *which_bytes)

    fleet = open_fleet(model_bytes=sum(array.nbytes for array in model.values()))
    properties = {wire.PIECES: True} if in_pieces else {}
    RawDevice(fleet.address, "0", answer, **properties)
    new = model
    for _ in range(2):
        step = one_round(fleet, new)
        assert step.dropped == []
        new = step.weights
    assert_same_bits(
        list(new.values()), [array + np.float32(1) + np.float32(1) for array in model.values()]
    )
    # 5 pieces or one message to send, and 7 chunks to fetch, in each round.
    assert messages == 2 * (["fit"] * (5 if in_pieces else 1) + ["get_parameters"] * 7)

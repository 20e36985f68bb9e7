"""What the server does with a device's bytes, for fuzzers: `check` raises if any does harm.

The first byte of an input chooses a target. Most take the rest as a message just as it came.
A few put it deeper into one, where changed bytes would seldom pass the lengths around them.
"""

import io
import json
import math
from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
from cryptography import x509

from federated.errors import BadReply, FederationError
from federated.rounds import Device, Job, Result
from federated.updates import MAX_EXAMPLES, Update, clean_metrics, make_score, make_update
from plumbing.addresses import check_cid
from plumbing.security import keys
from plumbing.security.gate import read_certificate, read_enrolment
from plumbing.security.identity import ENROL_REQUEST
from plumbing.stream import wire
from plumbing.stream.fleet import read_progress, read_reply
from plumbing.stream.session import Reply, Work, is_offer
from plumbing.stream.stream_pb2 import ClientMessage

MODEL = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.float32([0.5, -0.5]),
    "steps": np.array(7),
}
TRAINED = [array + array.dtype.type(1) for array in MODEL.values()]
GOOD = wire.encode_fit_reply(TRAINED, 10, {"loss": 1.5})
OFFER = wire.encode_fit_reply([], 10, {"loss": 1.5, wire.ROUND_ID: "1"})
TOKEN = str(keys.Token(bytes(keys.SECRET_BYTES), "00" * 32))
MODEL_BYTES = [array.tobytes() for array in MODEL.values()]


def check(data: bytes) -> None:
    """Read `data` as the server would.

    Raises:
        Exception: other than BadReply (FederationError for enrolments) was raised for it; or
            it changed the model, or was taken for another update than it is.
    """
    target = TARGETS.get(data[:1])
    if not target:
        return
    refusal = FederationError if target in ENROLMENT else BadReply
    try:
        target(data[1:])
    except refusal as error:
        assert str(error).isprintable(), f"a reason that is not one line: {error!r}"
        assert len(str(error)) < 1000, f"a reason that is too long: {error}"
    assert [array.tobytes() for array in MODEL.values()] == MODEL_BYTES, "the model was changed"


def greeting(data: bytes) -> None:
    properties = wire.decode_properties_reply(data)
    if properties is None:
        return
    json.dumps(clean_metrics(properties), allow_nan=False)
    try:
        check_cid(str(properties.get("cid")))
    except FederationError as error:
        raise BadReply(str(error)) from None


def progress(data: bytes) -> None:
    """A report of progress, in the metadata of a call."""
    report = read_progress(Device("0"), wire.decode_progress(data))
    assert 0 <= report.step <= report.steps and report.images_per_second >= 0
    json.dumps(dict(report.metrics), allow_nan=False)


def fit(data: bytes) -> None:
    """A fit reply: an offer, or with the weights in it."""
    is_offer(data, "1")
    update = read(data, [])
    reply = ClientMessage.FromString(data).fit_res
    assert update.num_examples == reply.num_examples <= MAX_EXAMPLES
    assert_same(update, reply.parameters.tensors)


def pieces(data: bytes) -> None:
    """A parameters reply, after an offer."""
    update = read(OFFER, [data])
    assert_same(update, ClientMessage.FromString(data).get_parameters_res.parameters.tensors)


def read(data: bytes, pieces: list[bytes]) -> Update:
    """Return the update in a device's reply; BadReply if it has none.

    `read_reply` makes a BadReply of whatever is raised in it. That nothing else is raised is
    seen in a second reading, without it.
    """
    result = result_of(Job("1", 0, MODEL, {}), data, pieces)
    if result.update is None:
        assert result.at_fault and result.problem
        assert result.problem.isprintable() and len(result.problem) < 1000
        arrays, num_examples, metrics = wire.decode_fit_reply(data)
        for piece in pieces:
            arrays += wire.decode_parameters_reply(piece)
        make_update(arrays, MODEL, num_examples, metrics)
        raise AssertionError(f"a good update was refused: {result.problem}")
    assert not result.problem and not result.at_fault
    json.dumps(dict(result.update.metrics), allow_nan=False)
    return result.update


def result_of(job: Job, data: bytes, pieces: list[bytes]) -> Result:
    work = Work(Device("0"), job, wire.WeightsRequest(list(MODEL.values()), {}))
    whole = wire.Chunk(0, len(MODEL), 0)  # what was asked for
    result = read_reply(Reply(work, data, chunks=[(whole, piece) for piece in pieces]))
    assert isinstance(result, Result) and result.job is job
    return result


def evaluation(data: bytes) -> None:
    """An evaluate reply."""
    result = result_of(Job("1", 1, MODEL, {}, "evaluate"), data, [])
    if result.score is None:
        assert result.at_fault and result.problem.isprintable() and len(result.problem) < 1000
        make_score(*wire.decode_evaluate_reply(data))
        raise AssertionError(f"a good score was refused: {result.problem}")
    reply = ClientMessage.FromString(data).evaluate_res
    assert math.isfinite(result.score.loss) and result.score.loss == reply.loss
    assert 0 < result.score.num_examples == reply.num_examples <= MAX_EXAMPLES
    json.dumps(dict(result.score.metrics), allow_nan=False)


def anything(data: bytes) -> None:
    """A reply to another question, such as an evaluate reply: no decoder takes it."""
    for decode in (greeting, fit, pieces):
        try:
            decode(data)
        except BadReply as error:
            refusal = error
        else:
            return
    raise refusal


def array(data: bytes) -> None:
    """The header of an array up to a line feed, and its content, in a fit reply."""
    header, _, content = data.partition(b"\n")
    size = (len(header) + 1) & 0xFFFF
    npy = b"\x93NUMPY\1\0" + size.to_bytes(2, "little") + header + b"\n" + content
    message = ClientMessage()
    message.fit_res.num_examples = 10
    message.fit_res.parameters.tensors.extend([npy, *map(wire.pack_array, TRAINED[1:])])
    fit(message.SerializeToString())


def metrics(data: bytes) -> None:
    """More fields of a fit reply with good weights: protobuf merges what comes in parts."""
    size = min(len(data), 0x3FFF)
    field = bytes([ClientMessage.FIT_RES_FIELD_NUMBER << 3 | 2, size & 0x7F | 0x80, size >> 7])
    fit(GOOD + field + data[:size])


def enrolment(data: bytes) -> None:
    read_enrolment([(ENROL_REQUEST, data)])


def signing_request(data: bytes) -> None:
    """The signing request in an enrolment that is good otherwise."""
    request = {"cid": "0", "token": TOKEN, "csr": data.decode("latin-1")}
    _, token, csr = read_enrolment([(ENROL_REQUEST, json.dumps(request).encode())])
    assert str(token) == TOKEN
    assert keys.key_hash(csr)


def certificate(data: bytes) -> None:
    """What a device shows on every call, hello and renew among them."""
    cid, key_hash = read_certificate(data, authority())
    assert (cid, key_hash) == (keys.common_name(authority()), keys.key_hash(authority()))


@cache
def authority() -> x509.Certificate:
    return x509.load_pem_x509_certificate(keys.nobody()[1])


def assert_same(update: Update, tensors: Iterable[bytes]) -> None:
    """Compare what counts as an update with what protobuf and NumPy read."""
    squares = 0.0
    for (name, sent), data in zip(MODEL.items(), tensors, strict=True):
        theirs = np.load(io.BytesIO(data), allow_pickle=False)
        assert (theirs.dtype, theirs.shape) == (sent.dtype, sent.shape)
        if sent.dtype.kind == "f":
            ours, theirs = update.delta[name], theirs.astype(float) - sent.astype(float)
            squares += float(np.square(ours).sum())
        else:
            ours = update.counters[name]
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_array_equal(ours, theirs)
        assert np.isfinite(ours).all()
    assert update.delta.keys() | update.counters.keys() == MODEL.keys()
    assert math.isclose(update.norm, math.sqrt(squares), rel_tol=1e-9, abs_tol=1e-300)


TARGETS: dict[bytes, Callable[[bytes], None]] = {
    b"g": greeting,
    b"r": progress,
    b"f": fit,
    b"p": pieces,
    b"v": evaluation,
    b"e": anything,
    b"a": array,
    b"m": metrics,
    b"j": enrolment,
    b"s": signing_request,
    b"c": certificate,
}
ENROLMENT = {enrolment, signing_request, certificate}

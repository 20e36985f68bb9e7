"""The stream's messages (stream.proto) to and from bytes, with few copies of the weights.

Protobuf's own way from arrays to bytes nests one message in another, which copies the
weights at each level (85 ms a level for ResNet18's 44.7 MB on a 2-core x86-64 machine).
Here protobuf sees the small fields alone. The weights are joined to them in one copy, and
are read straight out of the bytes received. Either end may be a stock Flower one.

Bytes from a device are hostile. Whatever reads or checks them stands under `untrusted()`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Dict, List, Sequence, TypeVar, Union

import numpy as np
from google.protobuf.message import DecodeError

from federated.errors import BadReply, FederationError
from plumbing.stream.stream_pb2 import (
    ClientMessage,
    Code,
    Parameters,
    Reason,
    Scalar,
    ServerMessage,
)

Weights = Sequence[np.ndarray]
Scalars = Dict[str, Any]  # Flower's config, properties and metrics: bool, bytes, float, int, str

TENSOR_TYPE = "numpy.ndarray"

# Between this project's server and devices a fit takes two requests. The first carries this
# key, with a name for the round, in its config; the device answers without weights and with
# the same key in its metrics: it has trained. The server asks for them when it has room, or
# never if the round is over; a device whose connection broke can offer them once more.
ROUND_ID = "round_id"

# Between them the weights of a large model travel in pieces of some arrays each. gRPC holds a
# message up to three times (its buffers, what it joins, what it hands over), at either end.
PIECE_BYTES = 4 << 20  # or one array
PIECES = "pieces"  # among its properties: this device takes a fit in pieces
MORE = "more"  # in the config of a fit or an evaluation: another piece follows, do not answer yet

# A device's update comes in chunks, so that the server sees whether there is progress: some
# arrays, or a range of the bytes that a large one's .npy form has. These are in the config of
# get_parameters; without them it asks for all arrays.
ONE_CHUNK_BYTES = 1 << 20  # a model up to this size comes in one
FIRST_CHUNK_BYTES = 1 << 16  # of a larger model, then twice as much: a stall is noticed soon
CHUNK_BYTES = 4 << 20  # at most; with 1 MB a round of ResNet18 takes 1.3 of the processor time
FIRST, COUNT = "first", "count"  # which arrays
SKIP, TAKE = "skip", "take"  # of the only one of them: which bytes

# In the answer to Hello: the server reads a reply to a greeting or a job only after the device's
# call of Announce, since any message can be large there. In the metadata of Join: this device
# makes those calls. A stock client does not: the server reads it when it has room.
ANNOUNCE = "announce"

# In the config of a get_properties: a line for the device's screen. Its answer is not read.
NOTE = "note"

# A device reports how far its training is by a call of its own, beside the stream. The report is
# in the call's metadata, of which gRPC takes 16 kB and no more.
PROGRESS_KEY = "progress-bin"
PROGRESS_BYTES = 2000

# Raised when one end of another version would misunderstand the other. In a device's
# properties and in the answer to Hello; absent it is 1.
PROTOCOL = 2
VERSION = "protocol"

MAX_DIMENSIONS = 32  # of an array; NumPy 2 takes 64

# The header of an .npy file as NumPy writes it, format 1.0: type, order, sizes. NumPy's own
# parser evaluates Python literals: it takes True for a size, and prints warnings.
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<>|][biufcUSVO]\d{0,9})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d+(?:, ?\d+)*)?),?\),? ?\} *\n",
    re.DOTALL,
)
MAX_REASON = 500  # characters of what is reported about bad bytes


@contextmanager
def untrusted() -> Iterator[None]:
    """Turn whatever is raised while a device's bytes are read or checked into a BadReply.

    Also as a decorator. NumPy, protobuf and Python raise nearly anything for bytes that were
    made for it, MemoryError and RecursionError included, and none of it may end a round. The
    message is one printable line, though it may quote the device.
    """
    try:
        yield
    except Exception as error:
        reason = str(error)
        if not isinstance(error, BadReply):
            reason = f"bytes that cannot be read ({type(error).__name__}: {reason})"
        if not reason.isprintable():
            reason = ascii(reason[:MAX_REASON])[1:-1]
        raise BadReply(reason[:MAX_REASON]) from error


def version_problem(version: Any, who: str = "this device") -> str | None:
    """Return why a peer of this project with that version of the protocol cannot take part."""
    if version == PROTOCOL:
        return None
    older = type(version) is int and version < PROTOCOL
    fault = f"{who} is of an older release" if older else f"{who} is of another release"
    return (
        f"{fault} (protocol {version!r:.20}, here {PROTOCOL}); use the same release on server and "
        "devices: update the project there and start it again, which builds the image again"
    )


# --- Arrays, in NumPy's .npy format ---------------------------------------------------


def pack_array(array: np.ndarray) -> bytes:
    """Return `array` as the contents of an .npy file."""
    return b"".join(_npy_parts(array))


@untrusted()
def unpack_array(data: bytes | bytearray | memoryview) -> np.ndarray:
    """Return the array in an .npy file's contents: a view of `data` or a copy.

    Raises:
        BadReply: `data` is no .npy file, or one of Python objects (never unpickled).
    """
    # Bytes 8 and 9 of format 1.0, the one for headers under 64 KiB, hold their length.
    start = 10 + int.from_bytes(data[8:10], "little")
    if start > 1024:
        raise BadReply(f"an array's header takes {start} bytes")
    dtype, shape, order = _read_npy_header(bytes(data[:start]))
    count = math.prod(shape)
    if len(data) - start != count * dtype.itemsize:
        raise BadReply(f"{len(data) - start} bytes for an array of shape {shape}, {dtype}")
    array = np.frombuffer(data, dtype, count, start)
    if not array.flags.aligned:  # arithmetic on it is twice as slow, which costs more than this
        array = array.copy()
    return array.reshape(shape, order=order)


def _npy_parts(array: np.ndarray) -> Parts:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return [_npy_header(array.dtype, array.shape), flat.data]


@lru_cache(maxsize=1024)
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer,
        {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape},
    )
    return buffer.getvalue()


@lru_cache(maxsize=1024)
def _read_npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], Any]:
    match = NPY_HEADER.fullmatch(header)
    if not match:
        raise BadReply(f"an array with the header {header[:100]!r}")
    descr, fortran_order, sizes = (group.decode() for group in match.groups())
    dtype, shape = np.dtype(descr), tuple(int(n) for n in sizes.split(",") if n.strip())
    if len(shape) > MAX_DIMENSIONS:
        raise BadReply(f"an array of {len(shape)} dimensions")
    if dtype.hasobject or dtype.itemsize == 0:
        raise BadReply(f"an array of shape {shape} and type {dtype}")
    return dtype, shape, "F" if fortran_order == "True" else "C"


# --- The server's messages ------------------------------------------------------------


def encode_get_properties(config: Mapping[str, Any]) -> bytes:
    """Ask a device what it is; `config` holds the settings that it needs to answer."""
    message = ServerMessage()
    _fill_scalars(message.get_properties_ins.config, config)
    message.get_properties_ins.SetInParent()
    return message.SerializeToString()


def encode_fit(weights: Weights, config: Mapping[str, Any]) -> bytes:
    """Ask a device to train from `weights` with the settings `config`."""
    instruction = ServerMessage.FitIns()
    _fill_scalars(instruction.config, config)
    return _with_tensors(ServerMessage, "fit_ins", instruction, map(_npy_parts, weights))


def encode_evaluate(weights: Weights, config: Mapping[str, Any]) -> bytes:
    """Ask a device to evaluate `weights` with the settings `config`."""
    instruction = ServerMessage.EvaluateIns()
    _fill_scalars(instruction.config, config)
    return _with_tensors(ServerMessage, "evaluate_ins", instruction, map(_npy_parts, weights))


class WeightsRequest:
    """What `encode` makes of weights, for as many devices as wanted: whole, or in pieces."""

    def __init__(
        self,
        weights: Weights,
        config: Mapping[str, Any],
        encode: Callable[[Weights, Mapping[str, Any]], bytes] = encode_fit,
    ) -> None:
        self.weights = weights
        self.config = config
        self.encode = encode
        sizes = [sum(map(len, _npy_parts(array))) for array in weights]
        self.slices = _pieces(sizes)  # of the weights; what each piece has
        self.chunks = _chunks(sizes)  # in which an update comes back

    @cached_property
    def whole(self) -> bytes:
        return self.encode(self.weights, self.config)

    def pieces(self) -> Iterator[bytes]:
        if len(self.slices) == 1:
            yield self.whole
            return
        for piece in self.slices[:-1]:
            yield self.encode(self.weights[piece], {MORE: True})
        yield self.encode(self.weights[self.slices[-1]], self.config)


def _pieces(sizes: Iterable[int]) -> list[slice]:
    """Return which of some things of such sizes go together."""
    bounds, count, total = [0], 0, 0
    for count, size in enumerate(sizes, 1):
        if total and total + size > PIECE_BYTES:
            bounds.append(count - 1)
            total = 0
        total += size
    return [slice(*pair) for pair in zip(bounds, [*bounds[1:], count])]


@dataclass(frozen=True)
class Chunk:
    """What one reply has of a device's update: some arrays, or a range of one array's bytes."""

    first: int
    count: int
    size: int  # bytes
    skip: int | None = None  # bytes of the array before the range; None for whole arrays
    last: bool = True  # the array ends with it

    def config(self) -> Scalars:
        """Return what asks a device for it."""
        arrays = {FIRST: self.first, COUNT: self.count}
        return arrays if self.skip is None else {**arrays, SKIP: self.skip, TAKE: self.size}


def _chunks(sizes: Sequence[int]) -> list[Chunk]:
    """Return the chunks in which arrays of such sizes travel."""
    chunks: list[Chunk] = []
    limit = ONE_CHUNK_BYTES if sum(sizes) <= ONE_CHUNK_BYTES else FIRST_CHUNK_BYTES
    first = total = 0  # of the arrays that are in no chunk yet
    for index, size in enumerate(sizes):
        if total and total + size > limit:
            chunks.append(Chunk(first, index - first, total))
            first, total, limit = index, 0, min(2 * limit, CHUNK_BYTES)
        if size <= limit:
            total += size
            continue
        skip = 0
        while skip < size:
            take = min(limit, size - skip)
            chunks.append(Chunk(index, 1, take, skip, skip + take == size))
            skip, limit = skip + take, min(2 * limit, CHUNK_BYTES)
        first = index + 1
    if total or not chunks:
        chunks.append(Chunk(first, len(sizes) - first, total))
    return chunks


def encode_get_parameters(config: Mapping[str, Any]) -> bytes:
    """Ask a device for the weights that it has."""
    message = ServerMessage()
    _fill_scalars(message.get_parameters_ins.config, config)
    message.get_parameters_ins.SetInParent()
    return message.SerializeToString()


def encode_goodbye(pause_seconds: int = 0) -> bytes:
    """Dismiss a device: the run is over, or it comes back after a pause."""
    message = ServerMessage()
    message.reconnect_ins.seconds = pause_seconds
    message.reconnect_ins.SetInParent()
    return message.SerializeToString()


@dataclass(frozen=True)
class Request:
    """What the server asks of a device."""

    kind: str  # get_properties, get_parameters, fit, evaluate or reconnect
    config: Scalars
    weights: Weights = ()
    reconnect_seconds: int = 0  # 0: never again


def decode_request(data: bytes) -> Request:
    """Read a server's message.

    Raises:
        FederationError: it is none that this client knows.
    """
    try:
        with untrusted():
            message, tensors = _open(ServerMessage, data)
            kind = message.WhichOneof("msg") or "nothing"
            instruction: Any = getattr(message, kind, None)
            if kind == "reconnect_ins":
                return Request("reconnect", {}, reconnect_seconds=instruction.seconds)
            if kind in ("get_properties_ins", "get_parameters_ins"):
                return Request(kind[: -len("_ins")], _scalars(instruction.config))
            if kind in ("fit_ins", "evaluate_ins"):
                weights = [unpack_array(tensor) for tensor in tensors]
                return Request(kind[: -len("_ins")], _scalars(instruction.config), weights)
    except BadReply as error:
        raise FederationError(f"the server sent what cannot be read: {error}") from error
    raise FederationError(f"the server asks for '{kind}', which this client does not know")


# --- The device's replies -------------------------------------------------------------


def encode_properties_reply(properties: Mapping[str, Any]) -> bytes:
    """Report what this device is."""
    message = ClientMessage()
    message.get_properties_res.status.code = Code.OK
    _fill_scalars(message.get_properties_res.properties, properties)
    return message.SerializeToString()


def encode_progress(report: Mapping[str, Any]) -> bytes:
    """Report how far this device is with its training."""
    return encode_properties_reply(report)


def encode_parameters_reply(weights: Weights, skip: int = 0, take: int | None = None) -> bytes:
    """Hand over the model's weights, or a range of the bytes that each array's .npy form has."""
    reply = ClientMessage.GetParametersRes()
    reply.status.code = Code.OK
    tensors: Iterable[Parts] = map(_npy_parts, weights)
    if take is not None:
        tensors = [_range_of(parts, skip, take) for parts in tensors]
    return _with_tensors(ClientMessage, "get_parameters_res", reply, tensors)


def _range_of(parts: Parts, skip: int, take: int) -> Parts:
    """Return a range of the bytes that `parts` are when joined."""
    found: Parts = []
    for part in parts:
        found.append(memoryview(part)[max(0, skip) : max(0, skip + take)])
        skip -= len(part)
    return found


def encode_fit_reply(weights: Weights, num_examples: int, metrics: Mapping[str, Any]) -> bytes:
    """Hand over the weights after local training."""
    reply = ClientMessage.FitRes(num_examples=num_examples)
    reply.status.code = Code.OK
    _fill_scalars(reply.metrics, metrics)
    return _with_tensors(ClientMessage, "fit_res", reply, map(_npy_parts, weights))


def encode_fit_failure(reason: str) -> bytes:
    """Report that the training failed, and why."""
    message = ClientMessage()
    message.fit_res.status.code = Code.FIT_NOT_IMPLEMENTED  # the nearest that Flower has
    message.fit_res.status.message = _text(reason)
    return message.SerializeToString()


def encode_evaluate_reply(loss: float, num_examples: int, metrics: Mapping[str, Any]) -> bytes:
    """Hand over the result of a local evaluation."""
    message = ClientMessage()
    message.evaluate_res.status.code = Code.OK
    message.evaluate_res.loss = loss
    message.evaluate_res.num_examples = num_examples
    _fill_scalars(message.evaluate_res.metrics, metrics)
    return message.SerializeToString()


def encode_evaluate_failure(reason: str) -> bytes:
    """Report that the evaluation failed, and why."""
    message = ClientMessage()
    message.evaluate_res.status.code = Code.EVALUATE_NOT_IMPLEMENTED
    message.evaluate_res.status.message = _text(reason)
    return message.SerializeToString()


def encode_done_reply(will_reconnect: bool) -> bytes:
    """Confirm that this device goes."""
    message = ClientMessage()
    message.disconnect_res.reason = Reason.RECONNECT if will_reconnect else Reason.ACK
    return message.SerializeToString()


@untrusted()
def decode_properties_reply(data: bytes) -> Scalars | None:
    """Return what the device reports of itself; None from a client that reports nothing.

    Raises:
        BadReply: the bytes are another message, or none.
    """
    reply, _ = _open_reply(data, "get_properties_res")
    if reply.status.code == Code.GET_PROPERTIES_NOT_IMPLEMENTED:
        return None
    return _scalars(reply.properties)


@untrusted()
def decode_progress(data: bytes) -> Scalars:
    """Return what `encode_progress` was given.

    Raises:
        BadReply: the bytes are no such report.
    """
    if len(data) > PROGRESS_BYTES:
        raise BadReply(f"a report of {len(data):,} bytes")
    return decode_properties_reply(data) or {}


@untrusted()
def decode_fit_reply(data: bytes) -> tuple[list[np.ndarray], int, Scalars]:
    """Return (weights, num_examples, metrics) of a reply to `encode_fit`.

    Raises:
        BadReply: the bytes are another message, or none; or the device could not train.
    """
    reply, tensors = _open_reply(data, "fit_res")
    if reply.status.code != Code.OK:
        raise BadReply(f"could not train: {reply.status.message or f'status {reply.status.code}'}")
    weights = [unpack_array(tensor) for tensor in tensors]
    return weights, reply.num_examples, _scalars(reply.metrics)


@untrusted()
def decode_evaluate_reply(data: bytes) -> tuple[float, int, Scalars]:
    """Return (loss, num_examples, metrics) of a reply to `encode_evaluate`.

    Raises:
        BadReply: the bytes are another message, or none; or the device could not evaluate.
    """
    reply, _ = _open_reply(data, "evaluate_res")
    if reply.status.code != Code.OK:
        problem = reply.status.message or f"status {reply.status.code}"
        raise BadReply(f"could not evaluate: {problem}")
    return reply.loss, reply.num_examples, _scalars(reply.metrics)


@untrusted()
def decode_parameters_reply(data: bytes) -> list[np.ndarray]:
    """Return the weights in a reply to `encode_get_parameters`.

    Raises:
        BadReply: the bytes are another message, or none.
    """
    _, tensors = _open_reply(data, "get_parameters_res")
    return [unpack_array(tensor) for tensor in tensors]


def join_chunks(replies: Iterable[tuple[Chunk, bytes]]) -> Iterator[np.ndarray]:
    """Yield the arrays in the replies to the requests for some chunks.

    Raises:
        BadReply: the bytes are another message, or none.
    """
    joined = bytearray()
    for chunk, data in replies:
        if chunk.skip is None:
            yield from decode_parameters_reply(data)
            continue
        _, tensors = _open_reply(data, "get_parameters_res")
        for tensor in tensors:
            joined += tensor
        if chunk.last and joined:  # else the device has no such array, as its number will show
            yield unpack_array(joined)
            joined = bytearray()


def _open_reply(data: bytes, expected: str) -> tuple[Any, list[memoryview]]:
    try:
        message, tensors = _open(ClientMessage, data)
    except DecodeError:
        raise BadReply(f"{len(data)} bytes that are no Flower message") from None
    kind = message.WhichOneof("msg")
    if kind != expected:
        raise BadReply(f"a message of type {kind}, not {expected}")
    return getattr(message, expected), tensors


# --- Weights in messages --------------------------------------------------------------
#
# A protobuf message is its fields, one after the other in any order. A field that holds
# bytes or another message is its number, its length, its content.

Parts = List[Union[bytes, memoryview]]  # to be joined
M = TypeVar("M", ServerMessage, ClientMessage)

VARINT, BYTES = 0, 2  # wire types, the last three bits of the number
FIXED_SIZES = {1: 8, 5: 4}  # bytes that the other wire types take
MAX_TAG_BYTES = 5  # of a field's number and type; protobuf takes no more, with zeros in front
MAX_FIELDS = 100_000  # in one message; a model has hundreds of arrays


def _with_tensors(message: type[M], kind: str, inner: Any, tensors: Iterable[Parts]) -> bytes:
    """Return a `message` of type `kind`: `inner`, with `tensors` as its parameters."""
    parameters: Parts = []
    for tensor in tensors:
        parameters += _field(Parameters.TENSORS_FIELD_NUMBER, tensor)
    parameters.append(Parameters(tensor_type=TENSOR_TYPE).SerializeToString())
    parts = [inner.SerializeToString(), *_field(inner.PARAMETERS_FIELD_NUMBER, parameters)]
    return b"".join(_field(message.DESCRIPTOR.fields_by_name[kind].number, parts))


def _open(message: type[M], data: bytes) -> tuple[M, list[memoryview]]:
    """Parse a `message`; return it without the tensors, and these.

    Raises:
        DecodeError: the bytes are no such message.
    """
    tensors: list[memoryview] = []
    rest = _take_tensors(memoryview(data), TENSORS[message], tensors)
    return message.FromString(rest), tensors


def _take_tensors(data: memoryview, path: Mapping[int, Any], tensors: list[memoryview]) -> bytes:
    """Return a message without the fields that `path` leads to; append those to `tensors`."""
    rest: Parts = []
    position = 0
    for _ in range(MAX_FIELDS):
        if position == len(data):
            return b"".join(rest)
        start = position
        key, position = _read_varint(data, position)
        number, wire_type = key >> 3, key & 7
        if position - start > MAX_TAG_BYTES:
            raise DecodeError(f"a field with a number of {position - start} bytes at byte {start}")
        if wire_type in (VARINT, BYTES):
            value, position = _read_varint(data, position)
        size = value if wire_type == BYTES else FIXED_SIZES.get(wire_type, 0)
        position += size
        if position > len(data) or wire_type not in (VARINT, BYTES, *FIXED_SIZES):
            raise DecodeError(f"a field that cannot be at byte {start} of {len(data)}")
        ahead = path.get(number) if wire_type == BYTES else None
        content = data[position - size : position]
        if ahead is None:
            rest.append(data[start:position])
        elif ahead:
            rest.extend(_field(number, [_take_tensors(content, ahead, tensors)]))
        else:
            tensors.append(content)
    raise DecodeError(f"more than {MAX_FIELDS} fields")


def _tensor_paths(message: Any) -> dict[int, Any]:
    """Return the numbers of the fields, one in the other, at whose end tensors are."""
    return {
        kind.number: {inner.number: {Parameters.TENSORS_FIELD_NUMBER: {}}}
        for kind in message.DESCRIPTOR.fields
        if (inner := kind.message_type.fields_by_name.get("parameters"))
    }


TENSORS = {message: _tensor_paths(message) for message in (ServerMessage, ClientMessage)}


def _field(number: int, parts: Parts) -> Parts:
    """Return the parts of the field that holds the joined `parts`."""
    return [_varint(number << 3 | BYTES) + _varint(sum(map(len, parts))), *parts]


def _varint(value: int) -> bytes:
    """Return protobuf's form of an integer: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return the integer at `position` and where it ends."""
    value = 0
    for shift, byte in zip(range(0, 70, 7), data[position : position + 10]):
        value |= (byte & 0x7F) << shift
        if byte <= 0x7F:
            return value, position + shift // 7 + 1
    raise DecodeError(f"a number without end at byte {position}")


# --- Parts of messages ----------------------------------------------------------------


def _fill_scalars(field: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        field[name].CopyFrom(_scalar(value))


def _scalar(value: Any) -> Scalar:
    if isinstance(value, bool):  # before int, which a bool is, too
        return Scalar(bool=value)
    if isinstance(value, int):
        return Scalar(sint64=value) if value < 2**63 else Scalar(uint64=value)
    if isinstance(value, float):
        return Scalar(double=value)
    if isinstance(value, str):
        return Scalar(string=_text(value))
    if isinstance(value, bytes):
        return Scalar(bytes=value)
    raise ValueError(f"{value!r} is of type {type(value).__name__}, which no message can hold")


def _text(value: str) -> str:
    """Return a text that a message can hold: the name of a file may be no UTF-8."""
    return value.encode(errors="replace").decode()


def _scalars(field: Any) -> Scalars:
    kinds = {name: scalar.WhichOneof("scalar") for name, scalar in field.items()}
    return {name: getattr(field[name], kind) for name, kind in kinds.items() if kind}

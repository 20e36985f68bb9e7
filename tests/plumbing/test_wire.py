"""Our messages against Flower's: the same on the wire, read by either; bad bytes do no harm."""

import pickle
import re
import subprocess
import sys

import flwr.common as fl
import numpy as np
import pytest
from flwr.common import serde
from flwr.proto import transport_pb2
from flwr.proto.transport_pb2 import ClientMessage, Reason, ServerMessage
from hypothesis import example, given, settings
from hypothesis import strategies as st

from federated.errors import BadReply, FederationError
from plumbing.stream import stream_pb2, wire
from tests.conftest import ROOT

ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "float64": np.linspace(-1, 1, 5),
    "float16": np.ones((1, 1, 2), np.float16),
    "int64": np.array([-1, 2**62]),
    "uint8": np.arange(256, dtype=np.uint8),
    "bool": np.array([True, False]),
    "Fortran order": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "every second": np.arange(10, dtype=np.float32)[::2],
    "0-d": np.array(7, np.int64),
    "empty": np.zeros((3, 0, 2), np.float32),
    "big-endian": np.arange(3, dtype=">f4"),
}
SCALARS = {
    "bool": True,
    "int": 1,
    "negative": -(2**63),
    "large": 2**64 - 1,
    "float": 1.0,
    "str": "ä",
    "bytes": b"\0\xff",
}
OK = fl.Status(fl.Code.OK, "")


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert (our.dtype, our.shape) == (their.dtype, their.shape)
        np.testing.assert_array_equal(our, their)


def assert_same_with_types(ours, theirs):
    assert ours == theirs
    assert {k: type(v) for k, v in ours.items()} == {k: type(v) for k, v in theirs.items()}


# --- The description of the messages ---


def described(message) -> dict:
    """Return what a message is on the wire: its fields by name, with all that they hold."""
    return {
        field.name: {
            "number": field.number,
            "type": field.type,
            "label": (field.is_repeated, field.is_required, field.has_presence),
            "packed": field.is_packed,
            "oneof": field.containing_oneof and field.containing_oneof.name,
            "map": bool(field.message_type and field.message_type.GetOptions().map_entry),
            "enum": field.enum_type and dict(values(field.enum_type)),
            "message": field.message_type and described(field.message_type),
        }
        for field in message.fields
    }


def values(enum) -> list[tuple[str, int]]:
    return [(value.name, value.number) for value in enum.values]


@pytest.mark.parametrize("name", ["ServerMessage", "ClientMessage"])
def test_messages_have_the_numbers_types_labels_and_oneofs_of_flowers(name):
    ours = described(stream_pb2.DESCRIPTOR.message_types_by_name[name])
    assert ours == described(transport_pb2.DESCRIPTOR.message_types_by_name[name])
    assert {field["oneof"] for field in ours.values()} == {"msg"}


def test_all_of_flowers_messages_and_enums_are_described():
    ours, theirs = stream_pb2.DESCRIPTOR, transport_pb2.DESCRIPTOR
    assert set(ours.message_types_by_name) == set(theirs.message_types_by_name)
    assert set(ours.enum_types_by_name) == set(theirs.enum_types_by_name)
    for name, enum in ours.enum_types_by_name.items():
        assert values(enum) == values(theirs.enum_types_by_name[name])


def without_versions(code):
    """Return generated code without what depends on the generator's version."""
    code = re.sub(r"(?ms)^_runtime_version\..*?^\)\n", "", code)
    return re.sub(r"(?m)^(from (typing|coll).*|.*runtime_version.*|# (Proto|NO CH).*)\n", "", code)


def test_generated_code_is_what_the_command_in_the_proto_makes(tmp_path):
    text = (ROOT / "plumbing/stream/stream.proto").read_text()
    command = re.search(r"python (-m grpc_tools\.protoc .*)", text)[1]
    command = command.replace("_out=.", f"_out={tmp_path}").split()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    made = sorted((tmp_path / "plumbing/stream").iterdir())
    assert [file.name for file in made] == ["stream_pb2.py", "stream_pb2.pyi"]
    for file in made:
        committed = (ROOT / "plumbing/stream" / file.name).read_text()
        assert without_versions(committed) == without_versions(file.read_text())


# --- Arrays ---


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_cross_both_ways_between_us_and_flwr(array):
    assert_same([fl.bytes_to_ndarray(wire.pack_array(array))], [array])
    assert_same([wire.unpack_array(fl.ndarray_to_bytes(array))], [array])


@pytest.mark.parametrize("name", [n for n in ARRAYS if n != "Fortran order"])
def test_arrays_in_c_order_have_flwrs_very_bytes(name):
    assert wire.pack_array(ARRAYS[name]) == fl.ndarray_to_bytes(ARRAYS[name])


def test_arrays_at_any_place_in_a_message_come_out_aligned():
    data = wire.pack_array(ARRAYS["float64"])
    for shift in range(8):
        array = wire.unpack_array(memoryview(bytes(shift) + data)[shift:])
        assert array.flags.aligned
        assert_same([array], [ARRAYS["float64"]])


def npy(header: str, content: bytes = b"", version: bytes = b"\1\0") -> bytes:
    text = header.encode("latin-1")
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + content


def header(shape: str = "(2,)", descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


BAD_ARRAYS = {
    "nothing": b"",
    "no .npy file": b"x" * 200,
    "objects": npy(header("(1,)", "'|O'"), pickle.dumps(np.array([Bomb()], object))),
    "objects in a struct": npy(header("(1,)", "[('a', '|O')]"), bytes(8)),
    "a negative size": npy(header("(-2,)"), bytes(8)),
    "two negative sizes": npy(header("(-1, -2)"), bytes(8)),
    "a huge size": npy(header(f"({2**62}, 4)"), bytes(8)),
    "a huge size of nothing": npy(header(f"({2**70}, 0)")),
    "too many dimensions": npy(header(f"({', '.join('1' * 70)})"), bytes(4)),
    "a size of Python 2": npy(header("(2L,)"), bytes(8)),
    "True as a size": npy(header("(True,)"), bytes(4)),
    "False as a size": npy(header("(2, False)")),
    "a size that is no number": npy(header("('2',)"), bytes(8)),
    "a number as its shape": npy(header("2"), bytes(8)),
    "types without size": npy(header("(2,)", "'|S0'")),
    "arrays as elements": npy(header("(1,)", "('<f4', (2,))"), bytes(8)),
    "no such type": npy(header("(2,)", "'nonsense'"), bytes(8)),
    "too little content": npy(header(), bytes(7)),
    "too much content": npy(header(), bytes(9)),
    "a header of code": npy("__import__('os').abort()\n"),
    "a header without end": npy("{" * 500),
    "a long header": npy(header() + " " * 2000, bytes(8)),
    "format 2": npy(header(), bytes(8), b"\2\0"),
}


@pytest.mark.parametrize("data", BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_what_is_no_plain_array_is_refused(data):
    with pytest.raises(BadReply):
        wire.unpack_array(data)


# --- Messages between us and flwr ---


def test_flwr_reads_our_fit_request_and_we_read_flwrs():
    message = ServerMessage.FromString(wire.encode_fit([*ARRAYS.values()], SCALARS))
    assert message.WhichOneof("msg") == "fit_ins"
    theirs = serde.fit_ins_from_proto(message.fit_ins)
    assert theirs.parameters.tensor_type == "numpy.ndarray"
    assert_same(fl.parameters_to_ndarrays(theirs.parameters), [*ARRAYS.values()])
    assert_same_with_types(theirs.config, SCALARS)

    request = wire.decode_request(
        ServerMessage(fit_ins=serde.fit_ins_to_proto(theirs)).SerializeToString()
    )
    assert request.kind == "fit"
    assert_same(request.weights, [*ARRAYS.values()])
    assert_same_with_types(request.config, SCALARS)


def test_flwr_reads_our_fit_reply_and_we_read_flwrs():
    data = wire.encode_fit_reply([*ARRAYS.values()], 25_000, SCALARS)
    theirs = serde.fit_res_from_proto(ClientMessage.FromString(data).fit_res)
    assert (theirs.status, theirs.num_examples) == (OK, 25_000)
    assert theirs.parameters.tensor_type == "numpy.ndarray"
    assert_same(fl.parameters_to_ndarrays(theirs.parameters), [*ARRAYS.values()])
    assert_same_with_types(theirs.metrics, SCALARS)

    data = ClientMessage(fit_res=serde.fit_res_to_proto(theirs)).SerializeToString()
    weights, num_examples, metrics = wire.decode_fit_reply(data)
    assert_same(weights, [*ARRAYS.values()])
    assert num_examples == 25_000
    assert_same_with_types(metrics, SCALARS)


def test_flwr_reads_our_other_replies():
    data = wire.encode_properties_reply(SCALARS)
    properties = serde.get_properties_res_from_proto(
        ClientMessage.FromString(data).get_properties_res
    )
    assert properties.status == OK
    assert_same_with_types(properties.properties, SCALARS)
    assert_same_with_types(wire.decode_properties_reply(data), SCALARS)

    data = wire.encode_parameters_reply([*ARRAYS.values()])
    parameters = serde.get_parameters_res_from_proto(
        ClientMessage.FromString(data).get_parameters_res
    )
    assert parameters.status == OK
    assert_same(fl.parameters_to_ndarrays(parameters.parameters), [*ARRAYS.values()])

    data = wire.encode_evaluate_reply(1.5, 100, SCALARS)
    result = serde.evaluate_res_from_proto(ClientMessage.FromString(data).evaluate_res)
    assert (result.status, result.loss, result.num_examples) == (OK, 1.5, 100)
    assert_same_with_types(result.metrics, SCALARS)

    for will_reconnect, reason in ((False, Reason.ACK), (True, Reason.RECONNECT)):
        message = ClientMessage.FromString(wire.encode_done_reply(will_reconnect))
        assert message.disconnect_res.reason == reason


def test_we_read_flwrs_other_requests():
    properties = serde.get_properties_ins_to_proto(fl.GetPropertiesIns(SCALARS))
    request = wire.decode_request(ServerMessage(get_properties_ins=properties).SerializeToString())
    assert request.kind == "get_properties"
    assert_same_with_types(request.config, SCALARS)

    parameters = serde.get_parameters_ins_to_proto(fl.GetParametersIns({}))
    request = wire.decode_request(ServerMessage(get_parameters_ins=parameters).SerializeToString())
    assert (request.kind, request.config) == ("get_parameters", {})

    evaluate = fl.EvaluateIns(fl.ndarrays_to_parameters([*ARRAYS.values()]), SCALARS)
    request = wire.decode_request(
        ServerMessage(evaluate_ins=serde.evaluate_ins_to_proto(evaluate)).SerializeToString()
    )
    assert request.kind == "evaluate"
    assert_same(request.weights, [*ARRAYS.values()])

    message = ServerMessage()
    message.reconnect_ins.seconds = 5
    request = wire.decode_request(message.SerializeToString())
    assert (request.kind, request.reconnect_seconds) == ("reconnect", 5)
    assert wire.decode_request(wire.encode_goodbye()).reconnect_seconds == 0


def test_flwr_reads_our_first_question_and_our_last_word():
    message = ServerMessage.FromString(wire.encode_get_properties(SCALARS))
    assert_same_with_types(
        serde.get_properties_ins_from_proto(message.get_properties_ins).config, SCALARS
    )
    assert ServerMessage.FromString(wire.encode_get_properties({})).WhichOneof("msg") == (
        "get_properties_ins"
    )
    assert ServerMessage.FromString(wire.encode_goodbye()).WhichOneof("msg") == "reconnect_ins"


def test_fields_may_come_in_any_order_and_in_parts():
    weights = [*ARRAYS.values()]
    metrics = serde.fit_res_to_proto(fl.FitRes(OK, fl.Parameters([], ""), 0, SCALARS))
    first = serde.fit_res_to_proto(fl.FitRes(OK, fl.ndarrays_to_parameters(weights[:4]), 7, {}))
    second = serde.fit_res_to_proto(fl.FitRes(OK, fl.ndarrays_to_parameters(weights[4:]), 9, {}))
    data = b"".join(
        ClientMessage(fit_res=part).SerializeToString() for part in (first, metrics, second)
    )
    update, num_examples, found = wire.decode_fit_reply(data)
    assert_same(update, weights)
    assert num_examples == 9
    assert_same_with_types(found, SCALARS)


# --- Messages that make no sense ---

GOOD = wire.encode_fit_reply(
    [ARRAYS["float32"], ARRAYS["0-d"]], 25_000, {"loss": 1.5, "board": "Pi", "hot": True}
)


def fit_reply(*tensors: bytes) -> bytes:
    message = ClientMessage()
    message.fit_res.parameters.tensors.extend(tensors)
    return message.SerializeToString()


BAD_REPLIES = {
    "nothing": (b"", "a message of type None, not fit_res"),
    "noise": (b"\xff" * 100, "100 bytes that are no Flower message"),
    "half of a message": (GOOD[: len(GOOD) // 2], "no Flower message"),
    "a group": (b"\x0b\x0c" + GOOD, "no Flower message"),
    "a length past the end": (b"\x22\xff\xff\xff\xff\x0f", "no Flower message"),
    "too many fields": (fit_reply(*[b""] * 100_001), "no Flower message"),
    "another reply": (wire.encode_properties_reply({}), "a message of type get_properties_res"),
    "a goodbye": (wire.encode_done_reply(True), "a message of type disconnect_res"),
    "a tensor of noise": (fit_reply(b"x" * 200), "an array"),
    "an escape code": (fit_reply(npy(header("(1,)", "'<0f4\x9b2J'"))), r"\x9b2J"),
    "a pickle": (fit_reply(BAD_ARRAYS["objects"]), "type object"),
}


@pytest.mark.parametrize("data, reason", BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_a_reply_that_makes_no_sense_is_a_bad_reply_with_its_reason(data, reason):
    with pytest.raises(BadReply) as error:
        wire.decode_fit_reply(data)
    assert reason in str(error.value)
    assert str(error.value).isprintable()


def test_a_device_that_could_not_train_is_quoted():
    message = ClientMessage()
    message.fit_res.status.code = fl.Code.FIT_NOT_IMPLEMENTED.value
    message.fit_res.status.message = "no images here"
    with pytest.raises(BadReply, match="could not train: no images here"):
        wire.decode_fit_reply(message.SerializeToString())


def test_text_of_a_device_cannot_move_the_cursor_or_fill_the_screen():
    message = ClientMessage()
    message.fit_res.status.code = fl.Code.FIT_NOT_IMPLEMENTED.value
    message.fit_res.status.message = "\x1b[2J\n" * 10_000
    with pytest.raises(BadReply) as error:
        wire.decode_fit_reply(message.SerializeToString())
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 3000


def test_a_client_that_reports_nothing_of_itself_has_no_properties():
    message = ClientMessage()
    message.get_properties_res.status.code = fl.Code.GET_PROPERTIES_NOT_IMPLEMENTED.value
    assert wire.decode_properties_reply(message.SerializeToString()) is None


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("too deep"), TypeError("a\nb")])
def test_whatever_is_raised_over_untrusted_bytes_is_a_bad_reply_of_one_line(error):
    with pytest.raises(BadReply) as caught, wire.untrusted():
        raise error
    assert type(error).__name__ in str(caught.value)
    assert str(caught.value).isprintable()


def test_ctrl_c_over_untrusted_bytes_stays_what_it_is():
    with pytest.raises(KeyboardInterrupt), wire.untrusted():
        raise KeyboardInterrupt


def test_settings_of_other_types_are_refused_before_they_are_sent():
    with pytest.raises(ValueError, match=r"\[1\] is of type list, which no message can hold"):
        wire.encode_get_properties({"sizes": [1]})


def test_a_request_that_makes_no_sense_is_named():
    with pytest.raises(FederationError, match="the server sent what cannot be read"):
        wire.decode_request(b"\xff" * 9)
    with pytest.raises(FederationError, match="the server asks for 'nothing'"):
        wire.decode_request(b"")


def assert_no_worse_than_a_bad_reply(data: bytes) -> None:
    for decode in (wire.decode_fit_reply, wire.decode_properties_reply):
        try:
            decode(data)
        except BadReply as error:
            assert str(error).isprintable()


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=8))
def test_changed_bytes_raise_nothing_but_bad_reply(changes):
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    assert_no_worse_than_a_bad_reply(bytes(data))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GOOD)), st.integers(0, len(GOOD)), st.binary(max_size=20))
def test_cut_and_pasted_bytes_raise_nothing_but_bad_reply(start, end, patch):
    assert_no_worse_than_a_bad_reply(GOOD[:start] + patch + GOOD[end:])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-2, 3) | st.integers(), max_size=70).map(tuple),
    st.sampled_from(["'<f4'", "'>i8'", "'|b1'", "'|O'", "'|V0'", "'<M8[s]'", "[('a', '<f4')]"]),
    st.binary(max_size=64),
)
@example((2**70, 0), "'<f4'", b"")
def test_any_shape_raises_nothing_but_bad_reply(shape, descr, content):
    assert_no_worse_than_a_bad_reply(fit_reply(npy(header(str(shape), descr), content)))


@pytest.mark.parametrize("seed", range(20))
def test_update_in_chunks_is_joined_to_the_same_arrays(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0, 1, 10, 20_000, 300_000, 700_000], rng.integers(1, 9))
    arrays = [rng.random(size).astype("f4") for size in sizes]
    request = wire.WeightsRequest(arrays, {})
    replies = []
    for chunk in request.chunks:
        take = None if chunk.skip is None else chunk.size
        some = arrays[chunk.first : chunk.first + chunk.count]
        replies.append((chunk, wire.encode_parameters_reply(some, chunk.skip or 0, take)))
    assert_same(list(wire.join_chunks(replies)), arrays)
    assert max(chunk.size for chunk in request.chunks) <= wire.CHUNK_BYTES


def test_text_that_is_no_utf_8_is_sent_with_question_marks():
    reason = "no image in 'caf\udce9'"  # as Python has the name of such a file
    with pytest.raises(BadReply, match=r"no image in 'caf\?'"):
        wire.decode_fit_reply(wire.encode_fit_failure(reason))
    reply = wire.decode_properties_reply(wire.encode_properties_reply({"data": reason}))
    assert reply == {"data": "no image in 'caf?'"}

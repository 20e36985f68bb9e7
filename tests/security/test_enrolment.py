"""Getting in with a token: who does, who does not, and what guessing and flooding come to."""

import contextlib
import json
import re
import sqlite3
import ssl
import string
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from federated.errors import FederationError, Refused
from plumbing.security import complaints, keys
from plumbing.security import gate as gate_module
from plumbing.security.gate import WAITING_EACH, Gate
from plumbing.security.identity import ENROL, ENROL_REQUEST
from plumbing.stream import device as transport
from tests.conftest import LONG, ROOT
from tests.security.conftest import (
    admitted,
    ask,
    channel,
    enrolment,
    hello,
    refusal,
    serve,
    token_for,
    wait_until,
)

GUESSES = 10_000 if LONG else 1_000


def cids(gate: Gate) -> list[str]:
    return [device.cid for device in gate.admissions.all()]


def uses_left(gate: Gate, token: keys.Token) -> int:
    with contextlib.closing(sqlite3.connect(gate.admissions.path)) as db:
        query = "SELECT uses_left FROM tokens WHERE mark = ?"
        return db.execute(query, [token.mark]).fetchone()[0]


def test_device_joins_with_a_token_and_needs_it_no_more(fleet, identity, join, recorder):
    token = token_for(fleet.gate, uses=1)
    join(fleet, identity("0", token=token))
    recorder.wait_for(1)
    assert recorder.lines()[0].startswith("device 0 was admitted from 127.0.0.1, key ")
    fleet.close(run_is_over=True)

    key_file = identity("0").path.read_bytes()
    assert str(token).encode() not in key_file and token.secret not in key_file
    assert not identity("0").pending.exists()
    assert identity("0").token is None
    assert identity("0", token=token).token is None  # as a container that starts again


# --- Tokens that are none ---


def test_token_with_one_character_changed_is_refused_wherever_it_is(make_gate):
    token = str(token_for(make_gate()))
    for i, right in enumerate(token):
        for wrong in set(string.ascii_letters + string.digits + "-_") - {right}:
            with pytest.raises(FederationError) as error:
                keys.parse_token(token[:i] + wrong + token[i + 1 :])
            assert token[6:20] not in str(error.value)


@pytest.mark.parametrize("i", [6, 30, 75])
def test_server_refuses_a_token_with_one_character_changed(fleet, i):
    token = str(token_for(fleet.gate))
    wrong = token[:i] + ("A" if token[i] != "A" else "B") + token[i + 1 :]
    with channel(fleet) as opened:
        assert "a character of it is wrong" in refusal(opened, enrolment("0", wrong))
        assert ask(opened, enrolment("0", token))


def test_token_of_another_secret_or_authority_is_refused(fleet, make_gate):
    token = token_for(fleet.gate)
    guessed = keys.Token(b"\0" * 16, fleet.gate.authority.hash)
    foreign = token_for(make_gate("eve"))
    with channel(fleet) as opened:
        for wrong in (guessed, foreign):
            assert refusal(opened, enrolment("0", wrong)).startswith(
                "PERMISSION_DENIED: this token is not known here"
            )
        assert ask(opened, enrolment("0", token))


def test_expired_token_admits_nobody(fleet, identity):
    token = token_for(fleet.gate, seconds=-1)
    with pytest.raises(Refused, match="this token has expired; take a new one from the server"):
        serve(fleet.address, identity("0", token=token))
    assert cids(fleet.gate) == []


def test_used_up_token_admits_nobody(fleet, identity):
    token = token_for(fleet.gate, uses=1)
    with channel(fleet) as opened:
        ask(opened, enrolment("0", token))
    with pytest.raises(Refused, match="this token is used up; take a new one from the server"):
        serve(fleet.address, identity("1", token=token))
    assert cids(fleet.gate) == ["0"]


def test_token_with_one_use_left_admits_one_of_many_at_the_same_instant(fleet):
    token = token_for(fleet.gate, uses=1)
    together = threading.Barrier(WAITING_EACH)

    def enrol(cid: int) -> str:
        with channel(fleet) as opened:
            grpc.channel_ready_future(opened).result(10)
            request = enrolment(str(cid), token)
            together.wait(20)
            try:
                return "ok" if ask(opened, request) else "nothing"
            except grpc.RpcError as error:
                return str(error.details())

    with ThreadPoolExecutor(WAITING_EACH) as pool:
        answers = Counter(pool.map(enrol, range(WAITING_EACH)))
    assert answers == {
        "ok": 1,
        "this token is used up; take a new one from the server": WAITING_EACH - 1,
    }
    assert len(cids(fleet.gate)) == 1


def test_cid_that_is_taken_is_refused_and_the_token_is_not_used(fleet, identity):
    admitted(fleet.gate, "0")
    token = token_for(fleet.gate, uses=1)
    with pytest.raises(Refused, match="a device 0 is admitted already; choose another --cid"):
        serve(fleet.address, identity("0", token=token))
    assert uses_left(fleet.gate, token) == 1


# --- Asking twice ---


def test_device_whose_answer_was_lost_asks_again_and_uses_the_token_once(
    fleet, identity, join, recorder, monkeypatch
):
    token = token_for(fleet.gate, uses=1)
    real = keys.write_private

    def full_disk(path, data):
        if path.name == "device-0.pem":
            raise FederationError(f"cannot write '{path}': No space left on device")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(keys, "write_private", full_disk)
        with pytest.raises(FederationError, match="No space left"):
            serve(fleet.address, identity("0", token=token))
    assert cids(fleet.gate) == ["0"] and uses_left(fleet.gate, token) == 0
    token_for(fleet.gate)  # as a server that is started again makes one

    join(fleet, identity("0", token=token))
    recorder.wait_for(1)
    assert uses_left(fleet.gate, token) == 0


def test_replayed_enrolment_gives_nothing_new(fleet):
    token = token_for(fleet.gate, uses=5)
    key = keys.new_key()
    request = enrolment("0", token, keys.signing_request(key, "0").decode())
    with channel(fleet) as opened:
        first = ask(opened, request)
        assert ask(opened, request) == first  # of no use without the key
        assert uses_left(fleet.gate, token) == 4
        # The same request with another cid or another key in it.
        other = {**json.loads(request), "csr": json.loads(enrolment("0", token))["csr"]}
        assert "admitted already" in refusal(opened, json.dumps(other).encode())

    pair = (keys.key_pem(key), first)
    assert hello(fleet, pair) == "ok"
    fleet.gate.admissions.note_seen([("0", "127.0.0.1")])
    with channel(fleet) as opened:  # from then on not even that
        assert "a device 0 is admitted already" in refusal(opened, request)
    fleet.gate.admissions.revoke("0")
    with channel(fleet) as opened:
        assert "this token is not known here" in refusal(opened, request)
    assert "device 0 was revoked" in hello(fleet, pair)


def test_request_that_its_key_did_not_sign_is_refused(fleet):
    token = token_for(fleet.gate)
    request = keys.x509.load_pem_x509_csr(keys.signing_request(keys.new_key(), "0"))
    der = bytearray(request.public_bytes(keys.Encoding.DER))
    der[-1] ^= 1
    pem = ssl.DER_cert_to_PEM_cert(bytes(der)).replace("CERTIFICATE", "CERTIFICATE REQUEST")
    with channel(fleet) as opened:
        assert "no valid certificate request" in refusal(opened, enrolment("0", token, pem))
    assert cids(fleet.gate) == []


@pytest.mark.parametrize("csr", ["", "\ud800", "\0", "x" * 3000, "-----BEGIN", {}, None, 7])
def test_request_that_is_none_is_refused(fleet, csr):
    token = token_for(fleet.gate, uses=1)
    request = json.dumps({"cid": "0", "token": str(token), "csr": csr}).encode()
    with channel(fleet) as opened:
        assert refusal(opened, request).startswith("PERMISSION_DENIED")
    assert uses_left(fleet.gate, token) == 1


def test_request_for_another_kind_of_key_is_refused(fleet):
    token = token_for(fleet.gate)
    name = keys.x509.Name([])
    for key in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 1024)):
        csr = keys.x509.CertificateSigningRequestBuilder(name).sign(key, keys.SHA256())
        pem = csr.public_bytes(keys.Encoding.PEM).decode()
        with channel(fleet) as opened:
            assert "its key is not on P-256" in refusal(opened, enrolment("0", token, pem))
    assert cids(fleet.gate) == []


# --- Names ---


@pytest.mark.parametrize(
    "cid",
    [
        "../../x",
        "/etc/passwd",
        "",
        ".." * 40,
        "x" * 65,
        "ü",
        "０",
        "0\n",
        "0\nround 3/3  devices 9/9",
        "0\r\x1b[2J",
        "0\u2028",
        "0\0",
        "-0 --insecure",
        "\ud800",
        "x" * 10_000,
        7,
        None,
        ["0"],
        {"0": 0},
    ],
    ids=lambda cid: ascii(cid)[:20],
)
def test_cid_that_is_no_name_is_refused_on_one_line(fleet, recorder, cid):
    token = token_for(fleet.gate, uses=1)
    with channel(fleet) as opened:
        assert refusal(opened, enrolment(cid, token))
    assert (cids(fleet.gate), uses_left(fleet.gate, token)) == ([], 1)
    recorder.drain()
    assert recorder.lines()
    assert all(line.isprintable() and len(line) < 400 for line in recorder.lines())
    names = {path.name for path in Path(fleet.gate.admissions.path).parent.iterdir()}
    assert names <= {"authority.pem", "authority.crt", "admissions.sqlite"} | {
        f"admissions.sqlite-{end}" for end in ("wal", "shm")
    }


# --- Whatever else comes ---

words = st.text(max_size=40) | st.sampled_from(["0", "", "../x", "join1_", "join1_AAAA", "\ud800"])
anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
GOOD_CSR = keys.signing_request(keys.new_key(), "0").decode()
cut = st.integers(0, len(GOOD_CSR))
csrs = words | st.just(GOOD_CSR) | cut.map(lambda n: GOOD_CSR[:n])
requests = st.fixed_dictionaries(
    {},
    optional={"cid": words | anything, "token": words | anything, "csr": anything | csrs},
) | st.fixed_dictionaries({"cid": st.just("0"), "token": words, "csr": csrs})
messages = (
    st.binary(max_size=300)
    | anything.map(lambda value: json.dumps(value).encode())
    | requests.map(lambda value: json.dumps(value).encode())
    | st.just(b"[" * 3000)
    | st.just(b"9" * 5000)
)


# Apart from hypothesis, which changes how deep all threads of its process may call.
SERVER = """
    import sys, threading
    from pathlib import Path
    from plumbing.security import complaints, gate
    from plumbing.report import Console
    from plumbing.stream.fleet import StreamFleet
    gate.PENALTY_SECONDS, complaints.PERIOD_SECONDS = 0.0, 0.5
    door = gate.Gate(Path(sys.argv[1]), lambda: ["127.0.0.1"])
    fleet = StreamFleet("127.0.0.1:0", {}, lambda properties: None, gate=door)
    print(fleet.address)
    threading.Thread(target=lambda: sys.exit(sys.stdin.read()), daemon=True).start()
    console = Console(fleet.address, 1, "")
    while True:
        console(fleet.wait())
"""


def test_no_enrolment_message_crashes_the_server(make_gate, launch, tmp_path):
    """Each gets its answer: that it is none."""
    gate = make_gate()
    command = [sys.executable, "-c", textwrap.dedent(SERVER), tmp_path / "owner"]
    process = launch("sh", "-c", 'sleep 600 | "$@"', "sh", *command, cwd=ROOT)
    fleet = SimpleNamespace(gate=gate, address=process.wait_for("127.0.0.1:")[0])
    fleet.address = process.lines[-1]
    seen: Counter[grpc.StatusCode] = Counter()
    with channel(fleet) as opened:
        call = opened.stream_stream(ENROL)

        @settings(
            max_examples=10_000 if LONG else 250,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(messages, st.lists(st.binary(max_size=50), max_size=2))
        def knock(message: bytes, body: list[bytes]) -> None:
            with pytest.raises(grpc.RpcError) as error:
                next(call(iter(body), timeout=20, metadata=[(ENROL_REQUEST, message)]))
            seen[error.value.code()] += 1

        knock()
    assert set(seen) == {grpc.StatusCode.PERMISSION_DENIED}
    assert cids(gate) == []
    assert hello(fleet, admitted(gate)) == "ok"
    # No traceback, and no line that a peer wrote.
    process.wait_for("^refused 127.0.0.1.*: ")
    assert all(line.startswith("refused ") and len(line) < 400 for line in process.lines[1:])


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("enrolment", "text")],
        [(ENROL_REQUEST, b"{}")] * 50,
        [(ENROL_REQUEST, b"x" * 7_000)],
        [(ENROL_REQUEST, b"x" * 1_000_000)],
        [(f"x{i}", "y" * 100) for i in range(1000)],
    ],
    ids=["none", "text", "50 times", "7 kB", "1 MB", "1000 others"],
)
def test_metadata_of_any_size_is_refused_and_the_server_stays(fleet, metadata):
    with channel(fleet) as opened, pytest.raises(grpc.RpcError) as error:
        next(opened.stream_stream(ENROL)(iter(()), timeout=20, metadata=metadata))
    assert error.value.code() in (
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )
    assert hello(fleet, admitted(fleet.gate)) == "ok"


def test_messages_of_somebody_unknown_are_not_read(fleet):
    """Who enrols may send a gigabyte: it stays with them."""
    before = psutil.Process().memory_info().rss
    sent = 0

    def gigabyte():
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b"x" * 1_000_000

    with channel(fleet) as opened, pytest.raises(grpc.RpcError):
        metadata = [(ENROL_REQUEST, b"{}")]
        next(opened.stream_stream(ENROL)(gigabyte(), timeout=20, metadata=metadata))
    assert sent < 20
    assert psutil.Process().memory_info().rss - before < 50e6


# --- Guesses and floods ---


def test_guesses_are_slowed_down_reported_in_few_lines_and_leave_nothing(
    fleet, identity, join, recorder, monkeypatch
):
    """One address guesses as fast as it can, from eight connections; a device joins beside it."""
    monkeypatch.setattr(gate_module, "PENALTY_SECONDS", 0.5)
    monkeypatch.setattr(complaints, "PERIOD_SECONDS", 0.5)
    looked_up = []
    real = fleet.gate.admissions.admit_by_token

    def counting(cid, key_hash, mark, sign):
        looked_up.append(mark)
        return real(cid, key_hash, mark, sign)

    monkeypatch.setattr(fleet.gate.admissions, "admit_by_token", counting)
    csr = keys.signing_request(keys.new_key(), "0").decode()
    token = token_for(fleet.gate)
    answers: Counter[str] = Counter()
    lock = threading.Lock()
    numbers = iter(range(GUESSES))

    def guess() -> None:
        with channel(fleet) as opened:
            call = opened.stream_stream(ENROL)
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                wrong = keys.Token(number.to_bytes(16), fleet.gate.authority.hash)
                request = enrolment("0", wrong, csr)
                metadata = [(ENROL_REQUEST, request), ("x-guesser", "1")]
                try:
                    next(call(iter(()), timeout=30, metadata=metadata))
                    answer = "ok"
                except grpc.RpcError as error:
                    answer = str(error.details())
                with lock:
                    answers[answer] += 1

    # By a mark in the call instead of by the address: all peers here are 127.0.0.1.
    monkeypatch.setattr(
        gate_module,
        "peer_address",
        lambda context: (
            "203.0.113.9"
            if ("x-guesser", "1") in tuple(map(tuple, context.invocation_metadata() or ()))
            else "192.168.1.7"
        ),
    )
    before = psutil.Process().memory_info().rss
    start = time.monotonic()
    threads = [threading.Thread(target=guess) for _ in range(16)]
    for thread in threads:
        thread.start()
    wait_until(lambda: answers)
    joining = time.monotonic()
    join(fleet, identity("7", token=token))
    recorder.wait_for(1)
    joined_in = time.monotonic() - joining
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - start
    grown = psutil.Process().memory_info().rss - before

    assert "ok" not in answers and sum(answers.values()) == GUESSES
    assert len(looked_up) <= WAITING_EACH * (seconds / 0.5 + 1) + 1  # the device's own is one
    assert joined_in < 10
    assert grown < 30e6, f"{grown / 1e6:.0f} MB"
    recorder.drain()
    lines = [line for line in recorder.lines() if "203.0.113.9" in line]
    assert 1 <= len(lines) <= 2 * (seconds / 0.5 + 2)

    def counted() -> int:
        return sum(
            int(line.split(" times")[0].split()[-1].replace(",", "")) if " times" in line else 1
            for line in recorder.lines()
            if "203.0.113.9" in line
        )

    recorder.until(lambda: counted() == GUESSES)
    wait_until(lambda: not fleet.gate.places.taken)
    print(
        f"{GUESSES} guesses in {seconds:.1f} s, {len(looked_up)} looked up, "
        f"{grown / 1e6:.1f} MB, {len(lines)} lines, a device joined in {joined_in:.2f} s"
    )


def test_refusals_with_many_different_words_are_reported_in_few_lines(fleet, recorder, monkeypatch):
    monkeypatch.setattr(complaints, "PERIOD_SECONDS", 0.2)
    monkeypatch.setattr(gate_module, "PENALTY_SECONDS", 0.0)
    monkeypatch.setattr(complaints, "KINDS", 50)
    with channel(fleet) as opened:
        for i in range(300):
            refusal(opened, enrolment(f"/{i}", "x"))
    fleet.gate.refusals.close()
    recorder.drain()
    lines = recorder.lines()
    numbers = [re.search(r"([0-9,]+) times", line) for line in lines]
    assert sum(int(n[1]) if n else 1 for n in numbers) == 300
    assert len(lines) <= 22 * 20  # each 0.2 s


@pytest.mark.parametrize("method", [transport.JOIN, transport.HELLO, ENROL])
def test_device_joins_amid_a_flood_of_strangers(fleet, identity, join, recorder, method):
    """Eight threads of nobody's ask as fast as they can, each with one connection."""
    over = threading.Event()
    asked = Counter()

    def flood() -> None:
        with channel(fleet) as opened:
            call = opened.stream_stream(method)
            while not over.is_set():
                with contextlib.suppress(grpc.RpcError):
                    next(call(iter(()), timeout=10, metadata=[(ENROL_REQUEST, b"{}")]))
                asked["times"] += 1

    threads = [threading.Thread(target=flood) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: asked["times"] > 100)
        pair = admitted(fleet.gate)
        begin = time.monotonic()
        join(fleet, identity("0", pair, fleet.gate.authority.pem))
        recorder.wait_for(1)
        assert time.monotonic() - begin < 10
        assert list(fleet.devices) == ["0"]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    wait_until(lambda: not fleet.gate.places.taken)


def test_flood_from_one_ipv6_network_counts_as_from_one_address(fleet):
    gate = fleet.gate
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(gate.places.take(f"2001:db8::{i:x}")) for i in range(20)]
        assert taken == [True] * WAITING_EACH + [False] * (20 - WAITING_EACH)
        assert stack.enter_context(gate.places.take("2001:db8:0:1::1"))
        assert stack.enter_context(gate.places.take("192.168.1.7"))
    assert not gate.places.taken


def test_many_devices_behind_one_address_enrol_one_after_the_other(fleet, identity, join, recorder):
    """Who is turned away for now comes back."""
    token = token_for(fleet.gate, uses=20)
    threads = [join(fleet, identity(str(cid), token=token)) for cid in range(20)]
    recorder.wait_for(20, seconds=60)
    assert sorted(cids(fleet.gate), key=int) == [str(cid) for cid in range(20)]
    assert not any(thread.problem for thread in threads)

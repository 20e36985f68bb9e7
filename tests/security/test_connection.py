"""Who gets through the door: TLS 1.3 alone, and certificates of the owner's authority alone."""

import http.client
import re
import socket
import ssl
import struct
import subprocess
import threading
import time

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from federated.errors import FederationError, Refused
from plumbing.addresses import parse_address
from plumbing.security import identity as identity_module
from plumbing.security import keys
from plumbing.stream import device as transport
from tests.devices import Adder
from tests.security.conftest import (
    HOUR,
    admitted,
    channel,
    hello,
    key_without_right,
    rogue,
    serve,
    token_for,
)

# --- What comes to the server ---


def test_admitted_device_gets_in(fleet, knock):
    pair = admitted(fleet.gate)
    assert knock(fleet.address, pair)[3] == 4  # a frame of HTTP/2: its settings
    assert hello(fleet, pair) == "ok"


def test_plain_text_is_hung_up_on(fleet):
    host, port = parse_address(fleet.address)
    plain = http.client.HTTPConnection(host, port, timeout=10)
    with pytest.raises((http.client.BadStatusLine, ConnectionError)):
        plain.request("GET", "/")
        plain.getresponse()
    with (
        grpc.insecure_channel(fleet.address) as opened,
        pytest.raises(grpc.RpcError, match="UNAVAILABLE"),
    ):
        opened.unary_unary(transport.HELLO)(b"", timeout=10)


def test_client_without_key_is_asked_to_join_with_a_token(fleet):
    with pytest.raises(
        Refused, match="only devices that its owner admitted; join with --join=TOKEN"
    ):
        serve(fleet.address, None)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_2])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1 is deprecated")
def test_tls_below_1_3_is_refused(fleet, knock, version):
    pair = admitted(fleet.gate)
    assert knock(fleet.address, pair, minimum_version=ssl.TLSVersion.TLSv1_3)
    limits = {"minimum_version": version, "maximum_version": version}
    assert knock(fleet.address, pair, **limits) == b""


@pytest.fixture
def bad_pair(request, fleet, make_gate):
    """A key and certificate that must not get in, by their name."""
    real, eve = fleet.gate.authority, make_gate("eve").authority
    good = admitted(fleet.gate, "0")
    server_key, server_certificate = real.sign_server(["127.0.0.1"])
    authority = keys.key_pem(real.key), real.pem
    same_name = rogue(keys.common_name(real.certificate), purpose=None)
    made = {
        "of another authority": lambda: rogue("0", signer=eve),
        "of an authority with the same name": lambda: rogue("0", signer=same_name),
        "self-signed": lambda: rogue("0"),
        "self-signed as an authority": lambda: rogue("0", purpose=None),
        "expired": lambda: admitted(fleet.gate, "1", begin=-2 * HOUR, end=-HOUR),
        "not yet valid": lambda: admitted(fleet.gate, "1", begin=HOUR, end=2 * HOUR),
        "signed by nobody's key": lambda: rogue("0", signer=keys.nobody()),
        "signed by an admitted device": lambda: rogue("0", signer=good),
        "signed by the server's key": lambda: rogue("0", signer=(server_key, server_certificate)),
        "the server's own": lambda: (server_key, server_certificate),
        "nobody's name, another key": lambda: rogue(keys.NOBODY),
        "valid, without its key": lambda: (key_without_right(good[1]), good[1]),
        "none": lambda: None,
        "for what servers do": lambda: admitted(
            fleet.gate, "1", purpose=ExtendedKeyUsageOID.SERVER_AUTH
        ),
    }
    assert authority[1]
    return made[request.param]()


@pytest.mark.parametrize(
    "bad_pair",
    [
        "of another authority",
        "of an authority with the same name",
        "self-signed",
        "self-signed as an authority",
        "expired",
        "not yet valid",
        "signed by nobody's key",
        "signed by an admitted device",
        "signed by the server's key",
        "the server's own",
        "nobody's name, another key",
        "valid, without its key",
        "none",
        "for what servers do",
    ],
    indirect=True,
)
def test_certificate_that_is_refused_in_the_handshake(fleet, knock, bad_pair):
    assert knock(fleet.address, bad_pair) == b""
    assert knock(fleet.address, admitted(fleet.gate, "good"))


def test_certificate_that_was_never_admitted_is_refused(fleet, recorder):
    stranger = rogue("0", signer=fleet.gate.authority)  # as after the owner lost the list
    assert "the key of device 0 is not admitted here; join again" in hello(fleet, stranger)
    recorder.until(recorder.lines)
    assert recorder.lines() == [
        "refused 127.0.0.1: the key of device 0 is not admitted here; join again with --join=TOKEN"
    ]


def test_authoritys_own_certificate_is_no_devices(fleet):
    authority = fleet.gate.authority
    assert hello(fleet, (keys.key_pem(authority.key), authority.pem)) != "ok"


@pytest.mark.parametrize("names", [[], ["0", "1"]])
def test_certificate_without_one_name_is_refused(fleet, names):
    key = keys.new_key()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n) for n in names])
    begin = keys.now() - HOUR
    builder = x509.CertificateBuilder(
        fleet.gate.authority.certificate.subject, name, key.public_key(), 1, begin, begin + 9 * HOUR
    )
    certificate = builder.sign(fleet.gate.authority.key, keys.SHA256())
    pair = keys.key_pem(key), keys.certificate_pem(certificate)
    assert hello(fleet, pair).startswith("PERMISSION_DENIED")


def test_nobody_may_enrol_and_no_more(fleet, recorder):
    assert hello(fleet) == "UNAUTHENTICATED: join with --join=TOKEN first"
    for method in (transport.JOIN, "/plumbing.Fleet/Renew"):
        with channel(fleet) as opened, pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            next(opened.stream_stream(method)(iter(())))
    recorder.drain()
    assert not fleet.devices


def test_certificate_of_nobody_can_be_made_again_by_everybody():
    key, certificate, _ = keys.parse_key_file(b"".join(keys.nobody()))
    builder = keys._builder(
        certificate.subject,
        certificate.subject,
        key.public_key(),
        *keys.life(certificate),
        ExtendedKeyUsageOID.CLIENT_AUTH,
    )
    again = builder.serial_number(1).sign(key, keys.SHA256(), ecdsa_deterministic=True)
    assert keys.certificate_pem(again) == keys.nobody()[1]


def test_device_can_only_be_the_cid_in_its_certificate(fleet, identity, recorder):
    pair = admitted(fleet.gate, "1")
    liar = identity("1", pair, fleet.gate.authority.pem)
    with pytest.raises(Refused, match="its key is that of device 1, it claims to be '0'"):
        serve(fleet.address, liar, Adder("0"))
    recorder.drain()
    assert not fleet.devices
    assert "its key is that of device 1, it claims to be '0'" in recorder.lines()[-1]


# --- What devices come to ---


def test_server_of_another_authority_is_refused_and_both_hashes_are_named(
    open_fleet, make_gate, identity
):
    owner, eve = make_gate(), make_gate("eve")
    fleet = open_fleet(gate=eve)
    known = identity("0", admitted(owner), owner.authority.pem)
    new = identity("1", token=token_for(owner))
    for device in (known, new):
        with pytest.raises(Refused) as error:
            serve(fleet.address, device)
        assert f"sha256:{owner.authority.hash}" in str(error.value)
        assert f"sha256:{eve.authority.hash}" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("chain", ["its own", "the owner's authority behind it"])
def test_man_in_the_middle_hears_nothing(make_gate, identity, impostor, chain):
    owner = make_gate()
    eve = rogue("server", purpose=ExtendedKeyUsageOID.SERVER_AUTH, names=["127.0.0.1"])
    middle = impostor(eve, owner.authority.pem if chain != "its own" else b"")
    known = identity("0", admitted(owner), owner.authority.pem)
    new = identity("1", token=token_for(owner))
    for device in (known, new):
        with pytest.raises(FederationError):
            serve(middle.address, device, seconds=1)
    assert middle.visits >= 2
    assert middle.heard == b""


def test_device_that_is_admitted_is_no_server(make_gate, identity, impostor):
    owner = make_gate()
    # Its certificate is of the owner's authority, and names this address even.
    pair = rogue("9", signer=owner.authority, names=["127.0.0.1"])
    middle = impostor(pair, owner.authority.pem)
    for device in (
        identity("0", admitted(owner), owner.authority.pem),
        identity("1", token=token_for(owner)),
    ):
        with pytest.raises(FederationError):
            serve(middle.address, device, seconds=1)
    assert middle.heard == b""


def test_server_certificate_for_another_name_is_refused(open_fleet, make_gate, identity):
    gate = make_gate(names=["laptop.example", "192.0.2.7"])
    fleet = open_fleet(gate=gate)
    known = identity("0", admitted(gate), gate.authority.pem)
    new = identity("1", token=token_for(gate))
    for device in (known, new):
        with pytest.raises(
            Refused, match=r"is not for 127.0.0.1 but for 192.0.2.7, laptop.example; start"
        ):
            serve(fleet.address, device, seconds=3)
    assert [d.cid for d in gate.admissions.all()] == ["0"]


def test_server_that_answers_with_nonsense_is_waited_for(make_gate, identity):
    listener = socket.create_server(("127.0.0.1", 0))

    def babble() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            peer.sendall(b"\x16\x03\x03\xff\xffnonsense" * 100)
            peer.close()

    threading.Thread(target=babble, daemon=True).start()
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    try:
        with pytest.raises(FederationError, match=r"no server at .* for 0.5 s, giving up"):
            serve(address, identity("0", token=token_for(make_gate())), seconds=0.5)
    finally:
        listener.close()


def test_server_that_people_start_refuses_tls_1_2(start_secure_server, make_gate, knock):
    """gRPC reads which ciphers it may use but once, when it is imported."""
    _, address, _ = start_secure_server()
    pair = admitted(make_gate())
    assert knock(address, pair)
    assert knock(address, pair, maximum_version=ssl.TLSVersion.TLSv1_2) == b""


def test_openssl_confirms_protocol_cipher_and_chain(fleet, tmp_path):
    gate = fleet.gate
    (tmp_path / "device.pem").write_bytes(b"".join(admitted(gate)))
    command = ["openssl", "s_client", "-connect", fleet.address, "-alpn", "h2", "-showcerts"]
    command += ["-CAfile", str(gate.admissions.path.with_name("authority.crt"))]
    command += ["-verify_return_error", "-verify_ip", "127.0.0.1"]
    device = ["-cert", str(tmp_path / "device.pem"), "-key", str(tmp_path / "device.pem")]

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *more], input="", capture_output=True, encoding="latin-1")

    shown = run(*device).stdout
    assert "New, TLSv1.3, Cipher is TLS_" in shown
    assert "Verify return code: 0 (ok)" in shown
    assert "ALPN protocol: h2" in shown
    assert "id-ecPublicKey, 256 (bit)" in shown and "sigalg: ecdsa-with-SHA256" in shown
    assert len(re.findall(r"^ \d s:", shown, re.MULTILINE)) == 2  # the server, the authority

    old = run(*device, "-tls1_2")
    assert "Cipher is (NONE)" in old.stdout and old.returncode
    wrong = run(*device, "-verify_ip", "192.0.2.1")
    assert wrong.returncode and "IP address mismatch" in wrong.stderr


def test_connection_that_was_reset_before_tls_is_no_server(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()
    while not near.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):  # which takes the error out
        time.sleep(0.01)
    monkeypatch.setattr(identity_module, "connected", lambda *_: near)
    with pytest.raises(identity_module.NotYet):
        identity_module.shown_certificates("127.0.0.1:1", 1)

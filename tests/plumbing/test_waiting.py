"""What a device prints while it cannot take part yet."""

import contextlib
import socket
import ssl
import tempfile
import threading
from concurrent import futures

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from federated.errors import FederationError, Refused
from plumbing.security import keys
from plumbing.stream import device
from tests.devices import Adder, Recorder


def test_second_device_of_a_name_hears_at_once_why_it_waits(open_fleet, caplog):
    fleet = open_fleet(keepalive_seconds=1.0)
    recorder = Recorder(fleet)
    threading.Thread(target=Adder("0").serve, args=(fleet.address,), daemon=True).start()
    recorder.wait_for(1)
    with caplog.at_level("INFO"), pytest.raises(Refused, match="--cid=0 is connected already"):
        Adder("0").serve(fleet.address)
    assert caplog.messages[0] == (
        "another connection has --cid=0; waiting up to 4 s for the server to give it up"
    )
    recorder.until(lambda: len(recorder.lines()) == 3)
    assert recorder.lines()[1] == (
        "device 0 waits up to 4 s to join: another connection has --cid=0"
    )
    assert recorder.lines()[2].startswith("refused device 0: a device with --cid=0")


# --- Something else listens ---


@pytest.fixture
def listener():
    """Serve each connection with a function, as a program of another kind would."""
    sockets = []

    def start(talk):
        door = socket.create_server(("127.0.0.1", 0))
        sockets.append(door)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = door.accept()
                    with peer, contextlib.suppress(OSError):
                        peer.settimeout(5)
                        talk(peer)

        threading.Thread(target=accept, daemon=True).start()
        return f"127.0.0.1:{door.getsockname()[1]}"

    yield start
    for door in sockets:
        door.close()


def ssh(peer):
    peer.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n")
    peer.recv(1000)


def web(peer):
    peer.recv(1000)
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def tls(peer):
    """Speak TLS with a certificate of somebody else's."""
    key, certificate = foreign_certificate("shop.example")
    with tempfile.NamedTemporaryFile() as file:
        file.write(key + certificate)
        file.flush()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file.name)
    with context.wrap_socket(peer, server_side=True) as secured:
        secured.recv(1000)


def foreign_certificate(name):
    key = keys.new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1)
    builder = builder.not_valid_before(keys.now()).not_valid_after(keys.now() + keys.DAY)
    return keys.key_pem(key), keys.certificate_pem(builder.sign(key, SHA256()))


@pytest.mark.parametrize(
    ("talk", "what"),
    [
        (ssh, "an SSH server (SSH-2.0-OpenSSH_9.2p1) listens there, not server.py"),
        (web, "a web server (HTTP/1.1 400 Bad Request) listens there, not server.py"),
        (tls, "another TLS server ('shop.example') listens there, not server.py"),
    ],
)
def test_what_listens_at_the_address_is_named(listener, caplog, monkeypatch, talk, what):
    monkeypatch.setattr(device, "HOPELESS_SECONDS", 1.5)
    address = listener(talk)
    with caplog.at_level("INFO"), pytest.raises(FederationError, match="giving up") as problem:
        Adder("0").serve(address, max_wait_seconds=6)
    assert f"({what})" in str(problem.value)
    lines = [line for line in caplog.messages if line.startswith(f"no server at {address} yet")]
    assert all(f"yet ({what}), next try in" in line for line in lines)
    assert lines[0].endswith("(is server.py running there?)")
    assert lines[-1].endswith(
        "(waiting will hardly help: check --server_address, and server.py there)"
    )


def test_grpc_server_of_another_kind_is_named(caplog):
    server = grpc.server(futures.ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    with pytest.raises(FederationError, match="does not know Flower's messages"):
        Adder("0").serve(address, max_wait_seconds=1)
    server.stop(None)

"""What an owner sees after a mistake: one line, what is wrong and what to do, and exit code 1."""

import contextlib
import io
import socket
import sqlite3
import sys
import time

import pytest

import client
import server
from federated.errors import FederationError, Refused
from plumbing.security import keys
from plumbing.security import owner as devices_module
from plumbing.security.identity import open_identity
from plumbing.stream.fleet import StreamFleet
from tests.conftest import complaint
from tests.devices import Recorder
from tests.security.conftest import admitted, rogue, run_python, serve, token_for


@pytest.fixture
def open_server():
    """A fleet without --secure."""
    fleet = StreamFleet("127.0.0.1:0", {"seed": 7}, lambda properties: None)
    yield fleet
    fleet.close(run_is_over=True)


# --- server.py ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--secure", "--insecure"], "--secure and --insecure exclude each other"),
        (["--keys=x"], "--keys needs --secure"),
        (["--names=a.example"], "--names needs --secure"),
        (["--unauthenticated_address=127.0.0.1:0"], "--unauthenticated_address needs --secure"),
        (["--secure", "--names=a b"], "--names 'a b' is no host name or IP address; example:"),
        (["--secure", "--names=a.example,ü"], r"--names '\xfc' is no host name or IP address"),
        (["--secure", "--unauthenticated_address=8080"], "server address '8080' is not HOST:PORT"),
        (["--secure", "--unauthenticated_address=203.0.113.5:0"], "not an address of this machine"),
        (["--secure", "--keys=/dev/null"], "the keys directory '/dev/null' cannot be made"),
    ],
)
def test_server_flags_that_cannot_be(tmp_path, arguments, message):
    defaults = ["--data_dir=synthetic:400", "--server_address=127.0.0.1:0"]
    defaults += [f"--run_dir={tmp_path / 'run'}"]
    if "--secure" in arguments:
        defaults.append(f"--keys={tmp_path / 'keys'}")
    line = complaint(server.main, *defaults, *arguments)
    assert line.startswith("server.py: ") and message in line


def test_second_address_that_is_in_use_is_reported(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = complaint(
            server.main,
            "--data_dir=synthetic:400",
            "--server_address=127.0.0.1:0",
            "--secure",
            f"--keys={tmp_path / 'keys'}",
            f"--unauthenticated_address={address}",
        )
    assert f"of '{address}' is in use" in line


def test_server_that_the_internet_can_reach_insists_on_a_word(monkeypatch):
    monkeypatch.setattr("plumbing.security.gate.local_addresses", lambda: ["127.0.0.1", "9.9.9.9"])
    line = complaint(server.main, "--server_address=0.0.0.0:0", "--data_dir=synthetic:400")
    assert "could be reached from the Internet, at 9.9.9.9, and anyone could join; use" in line
    assert "--secure" in line and "--insecure" in line
    for word in ("--secure", "--insecure"):
        server.check_args(*server.parse_args(["--server_address=0.0.0.0:0", word]))
    server.check_args(*server.parse_args(["--server_address=127.0.0.1:0"]))


def test_open_server_prints_in_one_line_that_anyone_can_join(open_server, capsys):
    server.print_who_may_join(open_server)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"anyone who reaches {open_server.address} can join; --secure lets in only whom you admit"
    )


# --- client.py ---


def client_complaint(tmp_path, *arguments: str) -> str:
    defaults = ["--server_address=127.0.0.1:1", "--cid=0", "--data_dir=synthetic:400"]
    return complaint(client.main, *defaults, f"--keys={tmp_path / 'home'}", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--join=abc"], "--join is neither a token (join1_…, as server.py prints it) nor a file"),
        (["--join=join1_"], "--join is no token: it must be as server.py prints it"),
        (["--join=join1_" + "A" * 70], "a character of it is wrong or missing"),
        (["--join=join1_a b"], "the token of --join has spaces or line breaks; leave them out"),
        (["--server_address=0.0.0.0:80"], "use the one that server.py prints"),
        (
            ["--server_address=http://a:80"],
            "begins with the name of a protocol; leave it out: a:80",
        ),
        (["--join="], "--join is neither a token"),
        (["--join=/"], "--join is neither a token"),
        (["--join=/dev/null"], "--join is no token"),
        (["--join=" + sys.executable], "--join is neither a token"),
        (["--join=/dev/null", "--insecure"], "--join is for a server with --secure; leave out"),
        (["--join_only"], "--join_only without --join, and there is no key yet"),
        (["--join=/dev/null", "--keys=/dev/null"], "the keys directory '/dev/null' cannot be made"),
        (["--cid=../../x"], "--cid '../../x' is not made of 1 to 64 letters"),
    ],
)
def test_client_flags_that_cannot_be(tmp_path, arguments, message):
    line = client_complaint(tmp_path, *arguments)
    assert line.startswith("client.py: ") and message in line


@pytest.mark.parametrize("typed", [b"", b"\n\n", b"\xff\xfe", b"join1_abc"])
def test_standard_input_without_a_token_is_refused(tmp_path, monkeypatch, typed):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
    assert "--join is n" in client_complaint(tmp_path, "--join=-")


@pytest.mark.parametrize("damage", ["half of it", "no certificate", "of another device"])
def test_unusable_key_file_is_refused_without_its_content(make_gate, tmp_path, damage):
    gate = make_gate()
    key, certificate = rogue("7" if damage == "of another device" else "0", gate.authority)
    data = key + certificate + gate.authority.pem
    data = {"half of it": data[:150], "no certificate": key}.get(damage, data)
    path = tmp_path / "card.pem"
    path.write_bytes(data)
    line = client_complaint(tmp_path, f"--join={path}")
    if damage == "of another device":
        assert "is the key of device 7, not of device 0; start the client with that --cid" in line
    else:
        assert "is no key file: no private key with a certificate" in line
    assert key.splitlines()[1].decode() not in line
    assert not list((tmp_path / "home").iterdir())


def test_key_file_joins_again_and_again_and_keeps_the_renewed_certificate(make_gate, tmp_path):
    gate = make_gate()
    key, certificate = admitted(gate)
    (tmp_path / "card.pem").write_bytes(key + certificate + gate.authority.pem)
    home = keys.private_directory(tmp_path / "home")
    identity = open_identity(home, "0", str(tmp_path / "card.pem"))
    public = identity.certificate.public_key()
    renewed = gate.authority.sign_device("0", public)
    identity.path.write_bytes(key + renewed + gate.authority.pem)
    again = open_identity(home, "0", str(tmp_path / "card.pem"))
    assert keys.certificate_pem(again.certificate) == renewed


def test_secured_device_at_an_open_server_prints_what_to_do(open_server, make_gate, identity):
    gate = make_gate()
    for device in (
        identity("0", admitted(gate), gate.authority.pem),
        identity("1", token=token_for(gate)),
    ):
        with pytest.raises(FederationError, match=r"start server.py with --secure") as error:
            serve(open_server.address, device, seconds=0.5)
        assert not isinstance(error.value, Refused)  # it may be started so
    assert "or this client with --insecure" in str(error.value) or device.token
    Recorder(open_server).drain()
    assert not open_server.devices


# --- server.py devices ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["revoke", "9"], "no device '9' is admitted; server.py devices lists them"),
        (["revoke", "1"], "device 1 was revoked already, on 20"),
        (["revoke", "../x\n"], r"no device '../x\n' is admitted"),
        (["revoke", "--", "-h"], "no device '-h' is admitted"),
        (["admit", "--out={}", "--", "-h"], "--cid '-h' is not made of 1 to 64 letters"),
        (["admit", "0", "--out={}"], "a device 0 is admitted already; choose another --cid"),
        (["admit", "../x", "--out={}"], "--cid '../x' is not made of 1 to 64 letters"),
        (["admit", "5", "--out=/dev/null"], "the keys directory '/dev/null' cannot be made"),
        (["token", "--hours=0"], "--hours 0 and --uses 10 must be above 0"),
        (["token", "--hours=nan"], "must be above 0"),
        (["token", "--hours=inf"], "must be above 0 and at most 1,000,000"),
        (["token", "--uses=0"], "must be above 0"),
        (["token", f"--uses={10**30}"], "must be above 0 and at most 1,000,000"),
        (["list", "--keys={}/none"], "there is no authority in"),
        (["revoke", "0", "--keys=/dev/null"], "there is no authority in"),
    ],
)
def test_devices_commands_that_cannot_be(make_gate, tmp_path, arguments, message):
    gate = make_gate()
    for cid in "01":
        admitted(gate, cid)
    gate.admissions.revoke("1")
    before = gate.admissions.all()
    arguments = [argument.format(tmp_path / "out") for argument in arguments]
    if not any("--keys" in argument for argument in arguments):
        arguments.insert(1, f"--keys={tmp_path / 'owner'}")
    line = devices_module.main(arguments)
    assert line and line.startswith("server.py: ") and message in line
    assert line.isprintable()
    assert gate.admissions.all() == before
    assert not list(tmp_path.glob("out/*"))


def test_devices_ends_with_one_line_and_code_1(devices):
    output = devices("revoke", "9", code=1)
    assert len(output.splitlines()) == 1


def test_revoking_several_revokes_those_that_are_admitted_and_names_the_others(make_gate, devices):
    gate = make_gate()
    for cid in "012":
        admitted(gate, cid)
    gate.admissions.revoke("1")
    output = devices("revoke", "0", "1", "9", "2", code=1)
    assert "device 0 is revoked" in output and "device 2 is revoked" in output
    problems = output.splitlines()[-1]
    assert "device 1 was revoked already, on " in problems
    assert "no device '9' is admitted" in problems
    assert all(device.revoked for device in gate.admissions.all())


def test_prune_removes_the_revoked_and_with_days_those_not_seen(make_gate, devices):
    admissions = make_gate().admissions
    for cid in ("0", "1", "2"):
        admissions.admit(cid, f"hash {cid}", b"")
    admissions.revoke("1")
    assert "removed 1 from the list: 1\n" in devices("prune")
    assert "removed 0 from the list\n" in devices("prune")
    assert [device.cid for device in admissions.all()] == ["0", "2"]
    with contextlib.closing(sqlite3.connect(admissions.path)) as db, db:
        db.execute("UPDATE devices SET last_seen = ? WHERE cid = '2'", [time.time() - 8 * 86400])
    assert "removed 0 from the list\n" in devices("prune", "--days=9")
    assert "removed 1 from the list: 2\n" in devices("prune", "--days=7")
    assert [device.cid for device in admissions.all()] == ["0"]
    assert "is not admitted here" in admissions.objection("2", "hash 2")
    assert "--days 0 must be above 0" in devices("prune", "--days=0", code=1)


def test_device_named_like_a_flag_on_an_older_list_can_be_revoked(make_gate, devices):
    gate = make_gate()
    admitted(gate, "-h")
    assert "device -h is revoked" in devices("revoke", "--", "-h")
    (device,) = gate.admissions.all()
    assert device.revoked


def test_token_is_alone_on_standard_output_and_explained_beside_it(make_gate):
    gate = make_gate()
    command = ["server.py", "devices", "token", "--uses=3", f"--keys={gate.admissions.path.parent}"]
    done = run_python(*command)
    assert keys.parse_token(done.stdout.strip()).authority_hash == gate.authority.hash
    assert done.stderr == "made a token for 3 devices, valid for 24 hours\n"


def test_empty_list_shows_how_devices_join(make_gate, devices):
    make_gate()
    assert "none so far; they join with --join=TOKEN" in devices()


def test_admit_leaves_a_file_that_is_there(make_gate, devices, tmp_path):
    gate = make_gate()
    out = keys.private_directory(tmp_path / "out")
    (out / "device-5.pem").write_text("mine")
    assert "is there already" in devices("admit", "5", "--out", out, code=1)
    assert (out / "device-5.pem").read_text() == "mine"
    assert gate.admissions.all() == []


def test_help_needs_no_keys():
    assert "revoke" in run_python("server.py", "devices", "--help").stdout

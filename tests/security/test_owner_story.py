"""The whole story with server.py and client.py, as an owner lives it."""

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from plumbing.security import keys
from tests.conftest import ROOT
from tests.security.conftest import run_python, token_in

ONE = {"min_num_clients": "1", "min_sample_size": "1"}


@pytest.fixture
def start_device(launch, tmp_path):
    """Start tests/faults/device.py, a device without torch, with keys of its own."""

    def start(address, cid, *arguments, stdin=None):
        home = tmp_path / f"home-{cid}"
        device = [ROOT / "tests/faults/device.py", address, str(cid), f"--keys={home}"]
        command = [sys.executable, *device, "--max_pause=0.2", *arguments]
        if stdin:
            (tmp_path / "stdin").write_text(stdin)
            command = ["sh", "-c", 'exec "$@" < "$0"', tmp_path / "stdin", *command]
        return launch(*command)

    return start


def secrets_in(*key_files: Path) -> list[str]:
    """Return what must be nowhere but in these files: lines of their private keys."""
    found = []
    for path in key_files:
        lines = path.read_bytes().partition(b"PRIVATE KEY-----\n")[2].splitlines()
        found.append(lines[1].decode())  # the first is the same in all
    return found


def test_owner_admits_devices_and_all_of_them_come_back_without_a_token(
    start_secure_server, start_client, start_device, devices, launch, tmp_path
):
    """A token from the screen, one in a file, one from standard input, and a key file.

    In the second round the server is killed and a device too; both start again.
    """
    run_dir, owner = tmp_path / "run", tmp_path / "owner"
    server, address, token = start_secure_server(
        min_num_clients="4", min_sample_size="4", rounds="2", num_partitions="4"
    )
    hash_shown = server.lines[0].partition("sha256:")[2]
    assert server.lines[0] == f"secured by authority sha256:{hash_shown}"
    assert hash_shown == keys.key_hash(keys.read_key_file(owner / "authority.pem")[1])
    assert server.lines[1] == "devices admitted so far: 0 (python server.py devices lists them)"

    joining = start_client(address, 0, f"--join={token}", f"--keys={tmp_path / 'home-0'}")
    (tmp_path / "token").write_text(f"{token}\n")
    by_file = start_device(address, 1, f"--join={tmp_path / 'token'}", f"--gate={tmp_path}")
    by_stdin = start_device(address, 2, "--join=-", stdin=f"{token}\n")
    devices("admit", "3", "--out", tmp_path / "cards")
    card = tmp_path / "cards/device-3.pem"
    by_key = start_device(address, 3, f"--join={card}")
    started = [joining, by_file, by_stdin, by_key]

    joining.wait_for("Client 0: fit")
    for device in started[1:]:
        device.wait_for("fit of round 1")
    shown = devices().splitlines()
    assert [line.split()[0] for line in shown[1:5]] == ["0", "1", "2", "3"]
    assert ["key file" in line for line in shown[1:5]] == [False, False, False, True]
    assert all(line.count("127.0.0.1") == 1 and "never" not in line for line in shown[1:5])
    assert shown[5].endswith(f"authority sha256:{hash_shown}")

    # Who looks at the processes of this machine sees the token where it was typed, and no more.
    key_files = [owner / "authority.pem", card, tmp_path / "home-2/device-2.pem"]
    secrets = secrets_in(*key_files)
    for process in psutil.process_iter(["cmdline", "environ"]):
        typed = " ".join(process.info["cmdline"] or [])
        inherited = str(process.info["environ"])
        assert not any(secret in typed + inherited for secret in secrets)
        assert token not in inherited
        assert token not in typed or process.pid == joining.popen.pid
    (tmp_path / "round-1").touch()
    by_file.wait_for("fit of round 2")

    server.signal(signal.SIGKILL)
    by_file.signal(signal.SIGKILL)
    server.finish()
    (tmp_path / "round-2").touch()
    started[1] = start_device(address, 1)
    resumed = launch(
        sys.executable, ROOT / "server.py", f"--resume={run_dir}", f"--server_address={address}"
    )
    assert resumed.finish() == 0
    assert [device.finish() for device in started] == [0] * 4
    assert resumed.lines[0] == f"secured by authority sha256:{hash_shown}"
    assert resumed.lines[1] == "devices admitted so far: 4 (python server.py devices lists them)"
    assert "admitted from" not in resumed.output
    second = token_in(resumed)
    assert second != token

    printed = [process.output for process in (server, resumed, by_file, *started)]
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    written += [*owner.glob("admissions*")]
    assert len(written) > 4
    for secret in [*secrets, token, second]:
        assert sum(text.count(secret) for text in printed) == (secret in (token, second))
        assert not any(secret.encode() in path.read_bytes() for path in written)
    for path in tmp_path.glob("home-*/*"):
        assert path.name == f"device-{path.parent.name[-1]}.pem"


def test_revoked_device_is_cut_off_in_mid_round_and_its_reply_does_not_count(
    start_secure_server, start_device, devices, tmp_path
):
    server, address, token = start_secure_server(rounds="1")
    gates = {cid: tmp_path / f"gate-{cid}" for cid in (0, 1)}
    for gate in gates.values():
        gate.mkdir()
    good, bad = (
        start_device(address, cid, f"--join={token}", f"--gate={gates[cid]}", f"--add={9**cid}")
        for cid in (0, 1)
    )
    for device in (good, bad):
        device.wait_for("fit of round 1")
    begin = time.monotonic()
    devices("revoke", "1")
    server.wait_for("dropped device 1: it was revoked")
    assert time.monotonic() - begin < 5

    # Meanwhile, from outside.
    for version, spoken in (("-tls1_3", True), ("-tls1_2", False), ("-tls1_1", False)):
        command = ["openssl", "s_client", "-connect", address, "-brief", version]
        done = subprocess.run(command, input=b"", capture_output=True)
        assert (b"Protocol version: TLSv1.3" in done.stderr) == spoken, version

    (gates[1] / "round-1").touch()
    assert bad.finish() == 1
    assert bad.lines[-1] == "device.py: the server refuses this device: it was revoked"
    (gates[0] / "round-1").touch()
    assert server.finish() == good.finish() == 0
    assert "devices 1/2" in server.output
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1:]
    assert [d["name"] for d in json.loads(line)["devices"]] == ["device 0"]
    assert "revoked 20" in devices().splitlines()[2]


def test_stock_flower_client_joins_where_the_owner_allows_it_and_nowhere_else(
    start_secure_server, start_device, tmp_path
):
    server, address, token = start_secure_server(
        min_num_clients="2", unauthenticated_address="127.0.0.1:0", rounds="1"
    )
    (line,) = [line for line in server.lines if "stock Flower clients" in line]
    stock_address = re.search(r"reach (\S+) can", line)[1]
    certificate = line.rpartition(" from ")[2]
    code = """
        import sys
        from pathlib import Path
        import flwr as fl

        class Client(fl.client.NumPyClient):
            def fit(self, parameters, config):
                return [p + 1 for p in parameters], 10, {}

        fl.client.start_client(
            server_address=sys.argv[1], client=Client().to_client(),
            root_certificates=Path(sys.argv[2]).read_bytes(), max_retries=0,
        )
    """
    elsewhere = run_python("-c", textwrap.dedent(code), address, certificate)
    assert elsewhere.returncode != 0
    stock = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), stock_address, certificate],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    server.wait_for(r"device \? joined")
    # There nobody may call themselves one of the owner's devices.
    liar = start_device(stock_address, 0, f"--join={token}")
    assert liar.finish() == 1
    assert "here only stock Flower clients join; take the server's other address" in liar.output
    ours = start_device(address, 0)
    assert server.finish() == ours.finish() == stock.wait(30) == 0
    assert "round 1/1  devices 2/2" in server.output

"""What is on disk: for its owner alone, whole or not there, and one authority a directory."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from federated.errors import FederationError
from plumbing.security import keys
from plumbing.security.admissions import Admissions
from plumbing.security.gate import Gate, local_names, public_address
from plumbing.security.identity import open_identity
from tests.conftest import ROOT
from tests.security.conftest import admitted, hello, run_python, token_for

MAKE = """
    import sys
    from pathlib import Path
    from plumbing.security.admissions import Admissions
    from federated.errors import FederationError
    from plumbing.security.keys import Authority
    try:
        authority = Authority(Path(sys.argv[1]))
        Admissions(Path(sys.argv[1])).make_token(authority.hash)
        print(authority.hash)
    except FederationError as error:
        sys.exit(str(error))
"""


def modes(directory: Path) -> dict[str, str]:
    paths = [directory, *directory.iterdir()]
    return {str(p.relative_to(directory.parent)): f"{p.stat().st_mode & 0o777:o}" for p in paths}


# --- Who can read ---


def test_all_files_are_their_owners_alone_whatever_the_umask(fleet, identity, devices, tmp_path):
    old = os.umask(0)
    try:
        gate = Gate(tmp_path / "loose", lambda: ["localhost"])
        identity("0", token=token_for(fleet.gate)).prepare(fleet.address, 5)
        devices("admit", "7", "--out", tmp_path / "cards")
        key_file = tmp_path / "cards/device-7.pem"
        assert open_identity(tmp_path / "card-7", "7", str(key_file))
    finally:
        os.umask(old)
    gate.admissions.make_token(gate.authority.hash)
    for name in ("loose", "device-0", "cards", "card-7"):
        for path, mode in modes(tmp_path / name).items():
            assert mode == ("700" if path == name else "600"), path
    assert (tmp_path / "card-7/device-7.pem").read_bytes() == key_file.read_bytes()


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o711, 0o702])
def test_directory_that_others_can_look_into_is_refused(tmp_path, make_gate, mode):
    token = str(token_for(make_gate()))
    (tmp_path / "owner").chmod(mode)
    with pytest.raises(
        FederationError, match=rf"others on this machine can .* \(mode {mode:o}\); run chmod 700"
    ):
        make_gate()

    home = tmp_path / "home"
    home.mkdir(mode=mode)
    home.chmod(mode)
    with pytest.raises(FederationError, match="run chmod 700"):
        open_identity(home, "0", token)
    assert not list(home.iterdir())
    (home / "device-0.pem").touch()
    with pytest.raises(FederationError, match="run chmod 700"):
        open_identity(home, "0", None)


@pytest.mark.skipif(os.getuid() != 0, reason="root alone can become somebody else")
def test_directory_of_another_user_is_refused_in_one_line():
    code = """
        import os, sys
        from pathlib import Path
        from federated.errors import FederationError
        from plumbing.security.identity import open_identity
        from plumbing.security.keys import Authority
        os.setresuid(65534, 65534, 65534)
        for use in (lambda path: open_identity(path, "0", None), Authority):
            try:
                use(Path(sys.argv[1]))
            except FederationError as error:
                print(error)
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        keys.Authority(Path(folder) / "owner")
        done = run_python("-c", textwrap.dedent(code), f"{folder}/owner", cwd=ROOT)
    first, second = done.stdout.splitlines()
    assert "may not look for its key" in first and "Permission denied" in first
    assert "user 65534 does not own the keys directory" in second
    assert "it belongs to user 0, who could read or replace the keys" in second


@pytest.mark.parametrize("what", ["a file", "a link to nowhere", "a link to a directory"])
def test_keys_directory_that_is_something_else(tmp_path, what):
    place = tmp_path / "keys"
    if what == "a file":
        place.touch()
    else:
        place.symlink_to(tmp_path / "target")
    if what == "a link to a directory":
        (tmp_path / "target").mkdir(mode=0o700)
        assert keys.Authority(place).hash
        return
    with pytest.raises(FederationError, match=r"cannot be made \(File exists\)"):
        keys.Authority(place)


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="root alone can give a file away")


@needs_root
@pytest.mark.parametrize("sudo", [False, True])
def test_directory_of_somebody_else_is_root_s_only_under_their_sudo(tmp_path, monkeypatch, sudo):
    place = tmp_path / "keys"
    place.mkdir(mode=0o700)
    os.chown(place, 65534, 65534)
    if sudo:
        monkeypatch.setenv("SUDO_UID", "65534")
        assert keys.Authority(place).hash
        return
    monkeypatch.delenv("SUDO_UID", raising=False)
    with pytest.raises(FederationError, match="it belongs to user 65534, who could read"):
        keys.Authority(place)
    assert not list(place.iterdir())


@needs_root
def test_link_of_somebody_else_is_not_followed(tmp_path):
    (tmp_path / "target").mkdir(mode=0o700)
    (tmp_path / "keys").symlink_to(tmp_path / "target")
    os.lchown(tmp_path / "keys", 65534, 65534)
    with pytest.raises(FederationError, match="the link to it belongs to user 65534"):
        keys.Authority(tmp_path / "keys")


def test_directory_that_anybody_could_replace_is_refused(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(
        FederationError, match=r"anybody .* can replace .*; run chmod o-w '.*shared'"
    ):
        keys.Authority(tmp_path / "shared/keys")
    (tmp_path / "shared").chmod(0o1777)  # as /tmp: each can remove their own alone
    assert keys.Authority(tmp_path / "shared/keys").hash


def test_link_that_is_pointed_elsewhere_while_the_server_starts_changes_nothing(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir(mode=0o700)
    link = tmp_path / "keys"
    link.symlink_to(tmp_path / "one")
    authority = keys.Authority(link)
    link.unlink()
    link.symlink_to(tmp_path / "two")
    assert Admissions(authority.directory).path == tmp_path / "one/admissions.sqlite"
    assert not list((tmp_path / "two").iterdir())


@pytest.mark.parametrize("by", ["another directory", "nothing"])
def test_directory_that_is_replaced_while_the_server_starts_is_refused(tmp_path, monkeypatch, by):
    place = tmp_path / "keys"
    real = keys.read_authority

    def read_and_replace(path):
        found = real(path)
        if not (tmp_path / "old").exists():
            place.rename(tmp_path / "old")
            if by != "nothing":
                place.mkdir(mode=0o700)
                (place / "authority.crt").touch()
        return found

    monkeypatch.setattr(keys, "read_authority", read_and_replace)
    with pytest.raises(FederationError, match=r"was replaced while|cannot write"):
        Gate(place, lambda: ["localhost"])


def test_authority_that_others_can_read_is_refused(make_gate, tmp_path):
    make_gate()
    path = tmp_path / "owner/authority.pem"
    path.chmod(0o640)
    with pytest.raises(
        FederationError, match=r"others .* can read the authority .*; run chmod 600"
    ):
        make_gate()


def test_authority_on_a_disk_that_is_not_there_is_not_made_again(make_gate, tmp_path):
    make_gate()
    path = tmp_path / "owner/authority.pem"
    (tmp_path / "disk").mkdir(mode=0o700)
    path.rename(tmp_path / "disk/authority.pem")
    path.symlink_to(tmp_path / "disk/authority.pem")
    before = make_gate().authority.hash
    (tmp_path / "disk").rename(tmp_path / "taken-out")
    with pytest.raises(FederationError, match=r"cannot read the authority .*No such file"):
        make_gate()
    (tmp_path / "taken-out").rename(tmp_path / "disk")
    assert make_gate().authority.hash == before


@pytest.mark.parametrize("name", ["authority.pem", "authority.crt", "admissions.sqlite"])
def test_directory_in_a_file_s_place_is_one_line(make_gate, tmp_path, name):
    make_gate()
    path = tmp_path / "owner" / name
    path.unlink()
    path.mkdir()
    with pytest.raises(FederationError, match=name) as error:
        make_gate()
    assert "\n" not in str(error.value)


# --- Whole or not there ---


def test_programs_that_start_at_once_share_one_authority(tmp_path):
    code = textwrap.dedent(MAKE).replace(
        "    authority =", "    while not Path(sys.argv[2]).exists(): pass\n    authority ="
    )
    command = [sys.executable, "-c", code, str(tmp_path / "keys"), str(tmp_path / "go")]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(6)
    ]
    time.sleep(1)  # whoever is not there by then starts a little later
    (tmp_path / "go").touch()
    printed = {process.communicate(timeout=60)[0].decode() for process in running}
    assert printed == {keys.Authority(tmp_path / "keys").hash + "\n"}
    assert not list((tmp_path / "keys").glob("*.part"))


def test_killed_at_any_step_of_the_first_start_the_next_one_works(tmp_path):
    """A child is killed before its first step at the disk, the next before its second, …"""
    code = """
        import os, signal, sys
        from pathlib import Path
        from plumbing.security.admissions import Admissions
        from plumbing.security.keys import Authority

        def make(place, left):
            def hook(event, args):
                nonlocal left
                if event in STEPS and place in str(args):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            authority = Authority(Path(place))
            Admissions(Path(place)).make_token(authority.hash)
            os._exit(0)

        STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "sqlite3.connect", "os.utime"}
        for step in range(1, 100):
            place = f"{sys.argv[1]}/{step}"
            pid = os.fork()
            if pid == 0:
                make(place, step)
            status = os.waitpid(pid, 0)[1]
            print(place, os.waitstatus_to_exitcode(status))
            if status == 0:
                break
    """
    done = run_python("-c", textwrap.dedent(code), tmp_path, cwd=ROOT)
    *killed, last = (line.split() for line in done.stdout.splitlines())
    assert last[1] == "0" and len(killed) > 6, done.stdout + done.stderr
    for place, code in killed:
        assert int(code) == -signal.SIGKILL
        hashes = {keys.Authority(Path(place)).hash for _ in range(2)}
        assert len(hashes) == 1
        Admissions(Path(place)).make_token(hashes.pop())
        public = Path(place, "authority.crt").read_bytes()
        assert public in Path(place, "authority.pem").read_bytes()


def test_full_disk_is_reported_in_one_line_and_leaves_no_half_authority(tmp_path):
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    code += textwrap.dedent(MAKE)
    done = run_python("-c", code, tmp_path / "keys", cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"cannot write '{tmp_path / 'keys/authority.pem'}': File too large"
    ]
    assert list((tmp_path / "keys").iterdir()) == []
    keys.Authority(tmp_path / "keys")
    done = run_python("-c", code, tmp_path / "keys", cwd=ROOT)  # now the list cannot be made
    assert len(done.stderr.splitlines()) == 1 and "cannot use" in done.stderr


@pytest.mark.parametrize("length", [0, 10, 200, 400])
def test_damaged_authority_is_reported_and_not_replaced(make_gate, tmp_path, length):
    make_gate()
    path = tmp_path / "owner/authority.pem"
    damaged = path.read_bytes()[:length]
    path.write_bytes(damaged)
    with pytest.raises(FederationError, match=r"authority\.pem' is damaged .* put it back from"):
        make_gate()
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", [b"", b"junk", b"SQLite format 3\0" + b"\xff" * 4000])
def test_damaged_list_is_reported_in_one_line(make_gate, tmp_path, content):
    make_gate()
    path = tmp_path / "owner/admissions.sqlite"
    path.write_bytes(content)
    if not content:  # as after a power cut at the first start
        assert make_gate().admissions.all() == []
        return
    with pytest.raises(FederationError, match=r"cannot use '.*sqlite': ") as error:
        make_gate()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 100, 300, 500])
def test_damaged_key_file_is_reported_without_its_content(fleet, identity, length):
    pair = admitted(fleet.gate)
    path = identity("0", pair, fleet.gate.authority.pem).path
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FederationError, match=r"device-0\.pem' is damaged .*; remove it, and join"):
        identity("0")
    identity("0", token=token_for(fleet.gate))  # joining again needs no removal


def test_damaged_key_of_a_join_that_was_cut_short_is_made_again(fleet, identity):
    token = token_for(fleet.gate)
    device = identity("0", token=token)
    device.pending.write_bytes(device.mark + b"-----BEGIN PRIVATE KEY-----\n")
    device.prepare(fleet.address, 5)
    assert hello(fleet, device.credentials) == "ok"


def test_key_and_certificate_of_two_devices_are_no_key_file(fleet, identity):
    one, other = admitted(fleet.gate, "0"), admitted(fleet.gate, "1")
    with pytest.raises(FederationError, match="its key and certificate do not belong together"):
        identity("0", (one[0], other[1]), fleet.gate.authority.pem)


def test_public_half_follows_the_authority(make_gate, tmp_path):
    make_gate()
    (tmp_path / "owner/authority.pem").unlink()
    gate = make_gate()
    assert (tmp_path / "owner/authority.crt").read_bytes() == gate.authority.pem


# --- What a server is called ---


def test_names_are_those_of_this_machine_and_of_the_flags():
    names = local_names("127.0.0.5:8080", ["a.example", "203.0.113.5", "2001:db8::7"])
    assert {"localhost", socket.gethostname(), f"{socket.gethostname()}.local"} <= set(names)
    assert {"127.0.0.1", "127.0.0.5", "a.example", "203.0.113.5", "2001:db8::7"} <= set(names)
    everywhere = local_names("[::]:8080") + local_names("0.0.0.0:8080")
    assert not {"::", "0.0.0.0"} & set(everywhere)


@pytest.mark.parametrize("name", ["a b", "ü.example", "x\ny", "", "a/b", "http://a", "x" * 300])
def test_name_that_is_none_is_refused(name):
    with pytest.raises(FederationError, match="is no host name or IP address") as error:
        local_names("127.0.0.1:8080", [name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("server_address", "public"),
    [
        ("127.0.0.1:1", None),
        ("[::1]:1", None),
        ("192.168.1.7:1", None),
        ("[fd00::1]:1", None),
        ("8.8.8.8:1", "8.8.8.8"),
        ("[2a00:1450::1]:1", "2a00:1450::1"),
        ("0.0.0.0:1", "9.9.9.9"),
        ("0:1", "9.9.9.9"),  # the same, as the system sees it
        ("[::]:1", "9.9.9.9"),
        ("[0::0]:1", "9.9.9.9"),
    ],
)
def test_public_address_is_found(monkeypatch, server_address, public):
    here = ["127.0.0.1", "10.0.0.1", "9.9.9.9", "fd00::1"]
    monkeypatch.setattr("plumbing.security.gate.local_addresses", lambda: here)
    assert public_address(server_address) == public


@pytest.mark.parametrize("host", ["[::1]", "127.0.0.1", "localhost"])
def test_device_reaches_the_server_by_any_of_its_names(open_fleet, make_gate, identity, host):
    fleet = open_fleet(server_address="[::1]:0" if host == "[::1]" else "127.0.0.1:0")
    port = fleet.address.rpartition(":")[2]
    device = identity("0", token=token_for(fleet.gate))
    device.prepare(f"{host}:{port}", 5)
    with device.channel(f"{host}:{port}", []) as channel:
        assert channel.unary_unary("/plumbing.Fleet/Hello")(b"", timeout=10)


def test_name_whose_first_address_is_dead_is_tried_at_the_next(open_fleet, identity, monkeypatch):
    fleet = open_fleet()
    port = int(fleet.address.rpartition(":")[2])
    both = [("::1", port), ("127.0.0.1", port)]  # as localhost often is
    monkeypatch.setattr("plumbing.addresses.resolve", lambda address: both)
    identity("0", token=token_for(fleet.gate)).prepare(f"localhost:{port}", 5)

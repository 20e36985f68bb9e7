"""The firewall's rules in docs/security.md, in a network of this test's own."""

import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from tests.conftest import ROOT

CONNECT = """
    import socket, sys
    listener = socket.create_server(("127.0.0.1", 8080))
    held = []
    for source in ["127.0.0.1"] * 50 + ["127.0.0.9"]:
        try:
            address = ("127.0.0.1", 8080)
            held.append(socket.create_connection(address, 5, source_address=(source, 0)))
        except ConnectionError:
            pass
    print(*(sum(s.getsockname()[0] == a for s in held) for a in ("127.0.0.1", "127.0.0.9")))
"""


def own_network(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["unshare", "--net", *command], capture_output=True, text=True, timeout=60
    )


@pytest.mark.skipif(
    not (all(map(shutil.which, ("nft", "ip", "unshare"))) and own_network("true").returncode == 0),
    reason="needs nft, ip and the right to make a network namespace",
)
def test_rules_bound_the_connections_from_one_address(tmp_path):
    (rules,) = re.findall(r"```nft\n(.*?)```", (ROOT / "docs/security.md").read_text(), re.DOTALL)
    (tmp_path / "fleet.nft").write_text(rules)
    (tmp_path / "connect.py").write_text(textwrap.dedent(CONNECT))
    script = f'ip link set lo up && nft -f fleet.nft && exec "{sys.executable}" connect.py'
    done = own_network("sh", "-c", f"cd '{tmp_path}' && {script}")
    assert done.stdout == "16 1\n", done.stderr

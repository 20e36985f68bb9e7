"""deploy/federated-server.service, as systemd reads it."""

import shutil
import subprocess

import pytest

from tests.conftest import ROOT


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_finds_nothing_wrong_with_the_servers_unit(tmp_path):
    text = (ROOT / "deploy/federated-server.service").read_text()
    assert "server.py --secure " in text and "KillSignal=SIGINT" in text
    for there, here in (("/srv/federated", str(ROOT)), ("User=federated", "User=root")):
        assert there in text
        text = text.replace(there, here)
    unit = tmp_path / "federated-server.service"
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

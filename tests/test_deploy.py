"""What deploy/ starts: Flower knows the flags, and the keys fit together."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


def compose_services() -> dict[str, dict]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def commands() -> dict[str, list[str]]:
    """Return the commands that deploy/ and run_pi.sh give to each of Flower's programs."""
    found: dict[str, list[str]] = {"flower-superlink": [], "flower-supernode": []}
    for path in DEPLOY.glob("flower-*.service"):
        [command] = re.findall(r"^ExecStart=((?:.*\\\n)*.*)", path.read_text(), re.M)
        found[Path(command.split()[0]).name].append(command)
    for service in compose_services().values():
        found[service["entrypoint"]].append(service["command"])
    launcher = (ROOT / "plumbing/supernode.sh").read_text()
    found["flower-supernode"] += re.findall(r"^  arguments=\(\n(.*?)\n  \)", launcher, re.M | re.S)
    return found


@pytest.mark.parametrize("program", commands())
def test_flags_are_flowers_own(program):
    path = Path(sys.executable).parent / program
    shown = subprocess.run([path, "--help"], capture_output=True, text=True, check=True).stdout
    for command in commands()[program]:
        flags = re.findall(r"(?<![^ +])--[a-z-]+", command)
        assert len(flags) >= 4
        assert not {*flags} - {*re.findall(r"--[a-z-]+", shown)}, command


def test_nothing_is_installed_or_sent_at_run_time():
    dockerfile = (ROOT / "base_images/engine/Dockerfile").read_text()
    for text in (*(path.read_text() for path in DEPLOY.glob("flower-*.service")), dockerfile):
        assert "FLWR_TELEMETRY_ENABLED=0" in text
        assert "FLWR_DISABLE_UPDATE_CHECK=1" in text
    for command in commands()["flower-superlink"]:
        assert "--disable-runtime-dependency-installation" in command


def make_keys(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [DEPLOY / "keys.sh", *arguments], cwd=folder, capture_output=True, text=True
    )
    return done.stdout if done.returncode == 0 else f"exit code {done.returncode}: {done.stdout}"


@pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="needs their makers"
)
def test_keys_fit_together_and_stay_when_a_supernode_is_added(tmp_path):
    assert "exit code 2: Make the keys" in make_keys(tmp_path)
    make_keys(tmp_path, "192.168.1.10", "kitchen")
    keys = tmp_path / "keys"
    authority, server = (
        x509.load_pem_x509_certificate((keys / name).read_bytes())
        for name in ("ca.crt", "server.crt")
    )
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "192.168.1.10" in map(str, names.get_values_for_type(x509.IPAddress))
    before = {path.name: path.read_bytes() for path in keys.iterdir()}
    make_keys(tmp_path, "192.168.1.10", "kitchen", "garden")
    after = {path.name: path.read_bytes() for path in keys.iterdir()}
    assert after.keys() - before.keys() == {"garden", "garden.pub"}
    assert {name: after[name] for name in before} == before
    for name, open_to_all in {"ca.key": 0, "server.key": 0, "kitchen": 0, "ca.crt": 0o044}.items():
        assert (keys / name).stat().st_mode & 0o077 == open_to_all, name
    for name in ("kitchen", "garden"):
        assert load_ssh_private_key((keys / name).read_bytes(), None).key_size == 384

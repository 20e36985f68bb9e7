"""Importing this project's modules changes nothing in the process; a main program does, once."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from plumbing import cli
from tests.conftest import ROOT

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in [
        *ROOT.glob("federated/**/*.py"),
        *ROOT.glob("plumbing/**/*.py"),
        *ROOT.glob("*.py"),
    ]
]

# What a process looks like before and after some imports. Their packages' own effects are
# found by importing these alone.
COMPARE = """
    import atexit, contextlib, gc, importlib, json, logging, os, signal, sys
    registered = []
    atexit.register, real = lambda *a, **k: registered.append(str(a)) or a[0], atexit.register
    printed = sys.stdout
    sys.stdout = sys.stderr
    before = set(sys.modules)
    for name in json.loads(sys.argv[1]):
        with contextlib.suppress(*[Exception] * (sys.argv[2] == "if possible")):
            importlib.import_module(name)
    numbers = [n for n in signal.valid_signals() if n not in (signal.SIGKILL, signal.SIGSTOP)]
    json.dump({
        "signals": {int(n): str(signal.getsignal(n)).partition(" at ")[0] for n in numbers},
        "gc": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), len(gc.callbacks)],
        "environment": dict(os.environ),
        "at the end": sorted(text.partition(" at ")[0] for text in registered),
        "logging": [logging.root.level, len(logging.root.handlers)],
        "modules": sorted(set(sys.modules) - before),
    }, printed)
"""
EFFECTS = ("signals", "gc", "environment", "at the end", "logging")


def after_importing(names, how="all"):
    """Return what a fresh interpreter looks like after some imports, and what they printed."""
    ours = {*cli.ENVIRONMENT, "GRPC_VERBOSITY", "PYTEST_CURRENT_TEST"}  # set for other tests
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPARE), json.dumps(names), how],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=100,
        env=environment,
    )  # fmt: skip
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def others():
    """Return all that is imported from elsewhere when our modules are, as a user's code may."""
    state, printed = after_importing(MODULES)
    rooms = {name.partition(".")[0] for name in MODULES}
    theirs = [name for name in state["modules"] if name.partition(".")[0] not in rooms]
    ours = set(state["modules"]) - set(theirs)
    assert set(MODULES) <= ours
    return state, printed, theirs


def test_importing_all_modules_has_no_effect_beyond_that_of_their_packages(others):
    state, printed, packages = others
    assert {"torch", "grpc", "flwr"} <= set(packages)
    alone, _ = after_importing(packages, "if possible")  # some make further ones, without a file
    assert len(alone["modules"]) > 0.9 * len(packages)
    for effect in EFFECTS:
        assert state[effect] == alone[effect], effect
    assert printed == ""


@pytest.mark.parametrize(
    "statement",
    [
        "import signal; signal.signal(signal.SIGTERM, lambda *_: None)",
        "import gc; gc.set_threshold(9)",
        "import os; os.environ['SET_BY_AN_IMPORT'] = '1'",
        "import atexit; atexit.register(len, ())",
        "import logging; logging.basicConfig()",
    ],
)
def test_an_effect_of_an_import_is_seen(tmp_path, monkeypatch, statement):
    (tmp_path / "with_effect.py").write_text(statement)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    state, _ = after_importing(["with_effect"])
    usual, _ = after_importing(["atexit", "gc", "logging", "os", "signal"])
    assert [effect for effect in EFFECTS if state[effect] != usual[effect]]


# Reports what server.py's process is like while it waits for devices.
SERVER = """
    import json, os, runpy, sys, threading, time
    from pathlib import Path

    def report():
        while not any(thread.name == "fleet" for thread in threading.enumerate()):
            time.sleep(0.05)
        from flwr.supercore import telemetry
        print("state", json.dumps({
            "telemetry": telemetry.FLWR_TELEMETRY_ENABLED, "environment": dict(os.environ),
        }), flush=True)

    threading.Thread(target=report, daemon=True).start()
    sys.argv[0] = str(Path(sys.argv.pop(1)) / "server.py")
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_real_server_has_flowers_telemetry_off(launch, tmp_path, monkeypatch):
    for name in cli.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)  # set in this process, for other tests
    server = launch(
        sys.executable, "-c", textwrap.dedent(SERVER), ROOT, "--server_address=127.0.0.1:0",
        "--data_dir=synthetic:400", f"--run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    state = json.loads(server.wait_for("^state (.*)")[1])
    assert state["telemetry"] == "0"
    assert cli.ENVIRONMENT.items() <= state["environment"].items()

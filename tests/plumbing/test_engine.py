"""What run_engine.sh refuses before it starts anything; tests/engine/run runs the rest."""

import importlib.metadata
import socket
import sys

import pytest

from plumbing import engine


def complaint(capsys, *arguments):
    with pytest.raises(SystemExit) as ending:
        engine.main(arguments)
    capsys.readouterr()
    assert "\n" not in str(ending.value.code)
    return str(ending.value.code)


@pytest.fixture
def versions(monkeypatch):
    """Let Flower and Ray be installed in the versions of a dict."""
    installed = {"flwr": "1.42.0", "ray": "2.55.1"}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return installed


def test_missing_ray_is_named_with_the_command_that_installs_it(versions, capsys):
    del versions["ray"]
    line = complaint(capsys)
    assert line.startswith("run_engine.sh: a simulation needs flwr[simulation]; ")
    assert f"{sys.executable} -m pip install -r requirements-engine.txt" in line


def test_superlink_needs_no_ray(versions, capsys, tmp_path):
    del versions["ray"]
    line = complaint(capsys, "--superlink", f"--data_dir={tmp_path}")
    assert line == f"run_engine.sh: no images in '{tmp_path}'; give --data_dir another directory"


def test_older_flwr_is_refused(versions, capsys):
    versions["flwr"] = "1.30.0"
    assert "flwr 1.30.0 is older than 1.42; install" in complaint(capsys)


def test_missing_flwr_is_named(versions, capsys):
    del versions["flwr"]
    assert "there is no flwr; install" in complaint(capsys)


def test_port_in_use_is_named(versions, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = complaint(capsys, f"--port={port}")
    assert f"cannot listen at 127.0.0.1:{port} (Address already in use)" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr=0"], "--lr 0 is not above 0"),
        (["--nodes=2", "--min_num_clients=3"], "--nodes 2 is below --min_num_clients 3"),
        (["--port=70000"], "--port 70000 is outside [0, 65535]"),
        (["--partition=odd"], "no partition 'odd'"),
        (["--resume=/nowhere"], "no run to resume in '/nowhere'"),
        (["--nodes=0"], "--min_num_clients 0 is below 1"),
    ],
)
def test_what_cannot_work_is_reported_in_one_line(versions, capsys, arguments, message):
    assert message in complaint(capsys, *arguments)


def test_value_of_another_type_ends_with_one_line(capsys):
    with pytest.raises(SystemExit):
        engine.main(["--rounds=three"])
    shown = capsys.readouterr().err
    assert shown == "run_engine.sh: argument --rounds: invalid int value: 'three'\n"


def test_all_nodes_are_waited_for_unless_fewer_are_named():
    assert engine.parse_args(["--nodes=5"]).min_num_clients == 5
    assert engine.parse_args(["--nodes=5", "--min-num-clients=3"]).min_num_clients == 3


def test_resumed_run_has_as_many_nodes_as_it_had(tmp_path):
    (tmp_path / "config.json").write_text('{"min_num_clients": 4, "rounds": 7, "data_dir": "/d"}')
    args = engine.parse_args([f"--resume={tmp_path}", "--rounds=9"])
    assert (args.nodes, args.min_num_clients, args.rounds, args.data_dir) == (4, 4, 9, "/d")


def test_what_the_app_reports_ends_the_output(capsys):
    lines = ["a\n", "flower_app.py: stopped; devices wait\n", "flower_app.py: why\n", "Trace\n"]
    assert engine.pass_on(lines) == "why"
    assert capsys.readouterr().out == "a\nstopped; devices wait\n"

"""plumbing/runs.py"""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from federated.errors import FederationError
from plumbing import runs as checkpoints
from plumbing.runs import RunDirectory, load_checkpoint, load_weights

WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7)}
CONFIG = {"model": "Net", "classes": ["milk", "tomato"]}


def test_checkpoint_round_trip_keeps_order_types_and_notes(tmp_path):
    run = RunDirectory(tmp_path / "run", CONFIG)
    run.save(1, WEIGHTS, metrics={"server_round": 1, "loss": float("nan")})
    path = tmp_path / "run" / "checkpoint.safetensors"
    for loaded, array in zip(load_weights(path, WEIGHTS, "Net"), WEIGHTS.values(), strict=True):
        np.testing.assert_array_equal(loaded, array)
        assert loaded.dtype == array.dtype
    with safetensors.safe_open(path, "np") as file:
        notes = {"server_round": "1", "model": "Net", "classes": '["milk", "tomato"]'}
        assert file.metadata() == notes
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == CONFIG
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"server_round": 1, "loss": null}\n'


def test_checkpoint_brings_back_round_weights_and_the_strategys_state(tmp_path):
    state = {"m_t/0": np.arange(6.0).reshape(2, 3)}
    RunDirectory(tmp_path / "run", CONFIG).save(7, WEIGHTS, state)
    server_round, weights, restored = load_checkpoint(tmp_path / "run", WEIGHTS, "Net")
    assert server_round == 7
    np.testing.assert_array_equal(weights[0], WEIGHTS["a"])
    assert restored.keys() == state.keys()
    np.testing.assert_array_equal(restored["m_t/0"], state["m_t/0"])


@pytest.mark.parametrize(
    "torn", [b'{"se', b"\xff\xfe\n", b'{"server_round": 1e999}\n' + b"[" * 9999]
)
def test_resumed_run_forgets_rounds_after_its_checkpoint_and_torn_lines(tmp_path, torn):
    RunDirectory(tmp_path / "run", CONFIG)
    lines = b'{"server_round": 1}\n{"server_round": 2}\n'
    (tmp_path / "run" / "metrics.jsonl").write_bytes(lines + torn)
    run = RunDirectory(tmp_path / "run", CONFIG, resumed_round=1)
    run.save(2, WEIGHTS, metrics={"server_round": 2, "again": True})
    assert run.rounds() == [{"server_round": 1}, {"server_round": 2, "again": True}]


def test_weights_come_in_the_models_order_whatever_the_files(tmp_path):
    safetensors.numpy.save_file(WEIGHTS, tmp_path / "w")
    backwards = dict(reversed(WEIGHTS.items()))
    assert [w.shape for w in load_weights(tmp_path / "w", backwards, "Net")] == [(), (2, 3)]


def test_failed_write_leaves_the_last_checkpoint_and_loses_no_metrics(
    tmp_path, monkeypatch, capsys
):
    run = RunDirectory(tmp_path / "run", CONFIG)
    run.save(1, WEIGHTS, metrics={"server_round": 1})
    good = (run.path / "checkpoint.safetensors").read_bytes()

    def no_room(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "fsync", no_room)
        run.save(2, WEIGHTS, metrics={"server_round": 2})
    said = capsys.readouterr().err
    assert "round 2: cannot write to" in said
    assert "(No space left on device); training goes on" in said
    assert (run.path / "checkpoint.safetensors").read_bytes() == good
    assert (run.path / "metrics.jsonl").read_text() == '{"server_round": 1}\n'
    assert not list(run.path.glob("*.part"))
    assert run.saved_round == 1
    with pytest.raises(FederationError, match="No space left on device"):
        run.finish(WEIGHTS)

    run.save(3, WEIGHTS, metrics={"server_round": 3})
    assert [metrics["server_round"] for metrics in run.rounds()] == [1, 2, 3]
    run.finish(WEIGHTS)


@pytest.mark.parametrize("damage", [b"", b"no weights", b"\xff" * 100])
def test_file_that_is_no_safetensors_is_refused(tmp_path, damage):
    (tmp_path / "w").write_bytes(damage)
    with pytest.raises(FederationError, match="is damaged or no safetensors file"):
        load_weights(tmp_path / "w", WEIGHTS, "Net")


def test_truncated_weights_are_refused(tmp_path):
    safetensors.numpy.save_file(WEIGHTS, tmp_path / "w")
    whole = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(whole[:-1])
    with pytest.raises(FederationError, match="is damaged"):
        load_weights(tmp_path / "w", WEIGHTS, "Net")


def test_directory_instead_of_a_weights_file_is_refused(tmp_path):
    with pytest.raises(FederationError, match="cannot read weights file"):
        load_weights(tmp_path, WEIGHTS, "Net")

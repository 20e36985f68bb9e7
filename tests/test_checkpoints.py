"""plumbing/checkpoints.py"""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from plumbing import checkpoints
from plumbing.checkpoints import RunDirectory, load_weights
from plumbing.errors import FederationError

WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7)}
NOTES = {"server_round": "1", "model": "Net"}


def test_checkpoint_round_trip_keeps_order_types_and_notes(tmp_path):
    run = RunDirectory(tmp_path / "run", {"rounds": 3})
    run.add_round({"server_round": 1, "loss": float("nan")}, WEIGHTS, NOTES)
    path = tmp_path / "run" / "checkpoint.safetensors"
    for loaded, array in zip(load_weights(path, WEIGHTS, "Net"), WEIGHTS.values(), strict=True):
        np.testing.assert_array_equal(loaded, array)
        assert loaded.dtype == array.dtype
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == NOTES
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"rounds": 3}
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"server_round": 1, "loss": null}\n'


def test_weights_come_in_the_models_order_whatever_the_files(tmp_path):
    safetensors.numpy.save_file(WEIGHTS, tmp_path / "w")
    backwards = dict(reversed(WEIGHTS.items()))
    assert [w.shape for w in load_weights(tmp_path / "w", backwards, "Net")] == [(), (2, 3)]


def test_failed_write_leaves_the_last_checkpoint_and_loses_no_metrics(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "run", {})
    run.add_round({"server_round": 1}, WEIGHTS, NOTES)
    good = (run.path / "checkpoint.safetensors").read_bytes()

    def no_room(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "fsync", no_room)
        with pytest.raises(FederationError, match="No space left on device"):
            run.add_round({"server_round": 2}, WEIGHTS, {"server_round": "2"})
    assert (run.path / "checkpoint.safetensors").read_bytes() == good
    assert (run.path / "metrics.jsonl").read_text() == '{"server_round": 1}\n'
    assert not list(run.path.glob("*.part"))

    run.add_round({"server_round": 3}, WEIGHTS, {"server_round": "3"})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["server_round"] for line in lines] == [1, 2, 3]


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

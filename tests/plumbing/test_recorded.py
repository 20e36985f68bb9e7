"""Runs and keys that older versions left on a disk: see tests/recorded/README.md."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import utils
from tests.conftest import ROOT

RECORDED = ROOT / "tests/recorded"
ADDED = np.float32(0.001)  # by the light device in each round, to each weight
DEVICE = ROOT / "tests/faults/device.py"


def weights_after_round_3(run: Path) -> dict[str, np.ndarray]:
    """Return what round 3 makes of a recorded checkpoint."""
    held = safetensors.numpy.load_file(run / "checkpoint.safetensors")
    weights = {name: array for name, array in held.items() if not name.startswith("strategy/")}
    if len(held) == len(weights):
        return {name: array + ADDED for name, array in weights.items()}
    # FedAvgM: half the momentum, which is numbered in the order of the model, plus the change.
    model = utils.build_model("Net", 10).state_dict()
    return {
        name: weights[name] + ADDED - held[f"strategy/momentum_vector/{i}"] / 2
        for i, name in enumerate(model)
    }


@pytest.mark.parametrize("name", ["run-v1", "run-v1-FedAvgM"])
def test_recorded_run_is_resumed_with_its_weights_and_the_strategys_state(launch, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(RECORDED / name, run)
    server = launch(sys.executable, ROOT / "server.py", f"--resume={run}")
    address = server.wait_for(r"waiting for 1 device at (\S+) ")[1]
    device = launch(sys.executable, DEVICE, address, "0", f"--add={ADDED}")
    assert server.finish() == 0, server.output
    assert device.finish() == 0, device.output
    assert f"resuming {run} after round 2" in server.output
    assert "Traceback" not in server.output
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [metrics["server_round"] for metrics in rounds] == [1, 2, 3]
    recorded = (RECORDED / name / "metrics.jsonl").read_text().splitlines()
    assert rounds[:2] == [json.loads(line) for line in recorded]
    model = safetensors.numpy.load_file(run / "model.safetensors")
    expected = weights_after_round_3(RECORDED / name)
    assert model.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_allclose(model[key], array, atol=1e-6, err_msg=key)


def test_recorded_keys_admit_their_device_without_a_token(launch, start_server, tmp_path):
    shutil.copytree(RECORDED / "keys-v1", tmp_path / "keys")
    for path in (tmp_path / "keys").rglob("*"):  # git keeps no such modes
        path.chmod(0o700 if path.is_dir() else 0o600)
    server, address = start_server(
        "--secure", keys=str(tmp_path / "keys/server"), rounds="1", min_num_clients="1",
        min_sample_size="1",
    )  # fmt: skip
    device = launch(sys.executable, DEVICE, address, "0", f"--keys={tmp_path / 'keys/device'}")
    assert device.finish() == 0, device.output
    assert server.finish() == 0, server.output
    assert "devices admitted so far: 1" in server.output
    assert "admitted from" not in server.output
    assert "round 1/1  devices 1/1" in server.output

"""Other releases of Flower: the one before ours, and stock clients back to 1.0.

The one before is laid over the installed one. With LONG=1 each old release gets an environment
of its own, with the protobuf and grpcio that it wants. Where the package index cannot be reached
these tests are skipped, with the reason.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

import utils
from tests.conftest import LONG, ROOT, free_port

BEFORE = "1.41.0"
OLD = ["1.0.0", "1.4.0", "1.8.0", "1.13.1", "1.30.0"]

CLIENT = """
import importlib.metadata, sys, flwr, numpy as np
print("flwr", importlib.metadata.version("flwr"), flush=True)
class Stock(flwr.client.NumPyClient):
    def fit(self, parameters, config):
        return [p + np.float32(1) for p in parameters], 10, {"seen_lr": config["lr"]}
    def evaluate(self, parameters, config):
        return 0.5, 20, {"accuracy": 0.25, "seen_lr": config["lr"]}
if hasattr(Stock, "to_client"):
    flwr.client.start_client(server_address=sys.argv[1], client=Stock().to_client())
else:
    flwr.client.start_numpy_client(server_address=sys.argv[1], client=Stock())
"""

SERVER = """
import importlib.metadata, sys, flwr
print("flwr", importlib.metadata.version("flwr"), flush=True)
flwr.server.start_server(
    server_address=sys.argv[1],
    config=flwr.server.ServerConfig(num_rounds=2),
    strategy=flwr.server.strategy.FedAvg(
        min_fit_clients=1, min_evaluate_clients=1, min_available_clients=1,
        on_fit_config_fn=lambda server_round: {"epochs": 2},
    ),
)
"""


def install(*arguments: str | Path) -> None:
    """Run pip; skip the test where there is no package index."""
    done = subprocess.run([*arguments], capture_output=True, text=True, timeout=400)
    if done.returncode:
        pytest.skip(f"cannot install another flwr here: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the release before ours, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("flwr")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install(*pip, "--no-deps", "--target", folder, f"flwr=={BEFORE}")
    return folder


@pytest.fixture
def with_before(before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start programs with the release before ours."""
    monkeypatch.setenv("PYTHONPATH", str(before))


def assert_trained(run_dir: Path, rounds: int = 2) -> None:
    """Compare a run's model and metrics with what CLIENT trains and reports."""
    after = safetensors.torch.load_file(run_dir / "model.safetensors")
    for name, first in utils.build_model("Net", 10, seed=0).state_dict().items():
        np.testing.assert_allclose(after[name], first + rounds, rtol=1e-6)
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["devices"][0]["metrics"]["seen_lr"] == row["lr"]
        metrics = row["device_scores"]["metrics"]
        assert metrics == {"loss": 0.5, "accuracy": 0.25, "seen_lr": row["lr"]}


ONE_DEVICE = {
    "rounds": "2", "min_num_clients": "1", "min_sample_size": "1", "sample_fraction_evaluate": "1",
}  # fmt: skip


@pytest.mark.usefixtures("with_before")
def test_server_and_stock_client_of_the_release_before_train_and_evaluate(
    start_server, launch, tmp_path
):
    server, address = start_server(**ONE_DEVICE)
    client = launch(sys.executable, "-c", CLIENT, address)
    assert server.finish() == 0, server.output
    assert client.finish() == 0, client.output
    assert f"flwr {BEFORE}" in client.lines
    assert json.loads((tmp_path / "run/config.json").read_text())["flwr"] == BEFORE
    assert_trained(tmp_path / "run")


@pytest.mark.usefixtures("with_before")
def test_our_client_trains_for_a_stock_server_of_the_release_before(start_client, launch):
    address = f"127.0.0.1:{free_port()}"
    client = start_client(address, "kitchen")
    server = launch(sys.executable, "-c", SERVER, address)
    assert server.finish() == 0, server.output
    assert client.finish() == 0, client.output
    assert f"flwr {BEFORE}" in server.lines
    assert client.lines.count("Training 2 epoch(s) w/ 12 batches each") == 2  # all 400 images
    assert client.lines.count("Client kitchen: evaluate") == 2


@pytest.mark.usefixtures("with_before")
def test_strategies_grid_and_messages_are_those_of_the_release_before() -> None:
    chosen = "flowers_own or survives or evaluat or oneofs or all_of_flowers"
    files = ["federated/test_strategies.py", "federated/test_device_evaluation.py"]
    files += ["plumbing/test_grid.py", "plumbing/test_wire.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", "-k", chosen]
    done = subprocess.run(
        [*command, *(ROOT / "tests" / file for file in files)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


@pytest.mark.skipif(not LONG, reason="installs an old flwr; LONG=1 runs it")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", OLD)
def test_stock_client_of_an_old_release_trains_and_evaluates(
    start_server, launch, tmp_path, version
):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin/python"
    install(python, "-m", "pip", "install", "--quiet", f"flwr=={version}")
    server, address = start_server(**ONE_DEVICE)
    client = launch(python, "-c", CLIENT, address, cwd=tmp_path)
    assert server.finish() == 0, server.output
    assert client.finish() == 0, client.output
    assert f"flwr {version}" in client.lines
    assert "device ? joined: a client that reports nothing of its board" in server.output
    assert_trained(tmp_path / "run")

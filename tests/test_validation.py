"""server.py --validation: held-out images choose the best checkpoint."""

import json

import numpy as np
import safetensors

import utils
from federated.settings import RunSettings
from plumbing.runs import RunDirectory
from torch_server import Task


def best_round(run):
    with safetensors.safe_open(run / "checkpoint.best.safetensors", "np") as best:
        return int(best.metadata()["server_round"])


def test_held_out_images_are_in_no_reported_result():
    task = Task(RunSettings(validation=0.1), "synthetic:1000")
    whole = utils.load_data("synthetic:1000", "test")
    assert (len(task.validation_set), len(task.testset)) == (20, 180)
    both = [s.images.flatten(1).numpy() for s in (task.validation_set, task.testset)]
    assert {bytes(i) for i in np.concatenate(both)} == {
        bytes(i) for i in whole.images.flatten(1).numpy()
    }
    evaluation = task.evaluate(utils.get_weights(task.net))
    expected = utils.test(task.net, task.testset)
    assert (evaluation["accuracy"], evaluation["loss"]) == (expected.accuracy, expected.loss)
    assert evaluation["test_images"] == "180 synthetic images"
    assert evaluation["validation_loss"] == utils.test(task.net, task.validation_set).loss


def test_best_round_is_kept_beside_the_last_also_after_a_resume(tmp_path):
    config = {"model": "Net", "classes": ["a", "b"]}
    run = RunDirectory(tmp_path / "run", config)

    def save(run, server_round, accuracy):
        weights = {"w": np.full(2, server_round, np.float32)}
        run.save(server_round, weights, metrics=row(server_round, accuracy))
        run.keep_best()
        return best_round(run.path)

    def row(server_round, accuracy):
        return {"server_round": server_round, "accuracy": 0.1, "loss": 1.0, "seconds": 1.0,
                "devices": [], "validation_accuracy": accuracy}  # fmt: skip

    assert [save(run, r, a) for r, a in ((1, 0.2), (2, 0.6), (3, 0.6), (4, 0.5))] == [1, 2, 2, 2]
    run.close()
    resumed = RunDirectory(tmp_path / "run", config, resumed_round=4)
    assert [save(resumed, 5, 0.55), save(resumed, 6, 0.7)] == [2, 6]


def test_run_with_validation_leaves_the_best_checkpoint(start_server, start_client, tmp_path):
    server, address = start_server(
        rounds="2", min_num_clients="1", min_sample_size="1", validation="0.25"
    )
    start_client(address, 0)
    assert server.finish() == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scores = [row["validation_accuracy"] for row in rows]
    assert best_round(tmp_path / "run") == 1 + scores.index(max(scores))
    assert "on 60 synthetic images" in server.output

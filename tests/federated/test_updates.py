"""federated/updates.py: what a reply must be before it may touch the global model."""

import math

import numpy as np
import pytest

from federated.errors import BadReply
from federated.updates import (
    MAX_EXAMPLES,
    Bounds,
    Update,
    clean_metrics,
    lower_median,
    make_update,
    norm_of,
)

NAMES = ["fc.weight", "fc.bias", "batches"]
MODEL = [np.zeros((2, 3), np.float32), np.zeros(2, np.float32), np.array(5)]


def check(update: list[np.ndarray], num_examples: int = 100) -> Update:
    return make_update(iter(update), dict(zip(NAMES, MODEL, strict=True)), num_examples)


def changed(place, array):
    return [*MODEL[:place], array, *MODEL[place + 1 :]]


def poisoned(*values):
    weight = MODEL[0].copy()
    weight.flat[: len(values)] = values
    return changed(0, weight)


def test_an_update_that_fits_passes():
    check(MODEL)
    check([array + 1 for array in MODEL])
    check(changed(0, np.asfortranarray(MODEL[0])), num_examples=MAX_EXAMPLES)
    check(poisoned(np.finfo(np.float32).max, np.finfo(np.float32).min), num_examples=1)


BAD_UPDATES = {
    "no arrays": ([], "0 arrays for a model that has 3"),
    "one array fewer": (MODEL[:2], "2 arrays for a model that has 3"),
    "one array more": ([*MODEL, MODEL[1]], "4 arrays for a model that has 3"),
    "another shape": (
        changed(0, np.zeros((2, 4), np.float32)),
        "fc.weight is float32 (2, 4), not float32 (2, 3)",
    ),
    "a shape that would broadcast": (
        changed(0, np.zeros((1, 3), np.float32)),
        "fc.weight is float32 (1, 3), not float32 (2, 3)",
    ),
    "a dimension more": (
        changed(1, np.zeros((2, 1), np.float32)),
        "fc.bias is float32 (2, 1), not float32 (2,)",
    ),
    "float64": (changed(1, np.zeros(2)), "fc.bias is float64 (2,), not float32 (2,)"),
    "integers": (
        changed(1, np.zeros(2, np.int32)),
        "fc.bias is int32 (2,), not float32 (2,)",
    ),
    "another byte order": (
        changed(1, np.zeros(2, ">f4")),
        "fc.bias is >f4 (2,), not float32 (2,)",
    ),
    "strings": (changed(1, np.array(["a", "b"])), "fc.bias is <U1 (2,), not float32 (2,)"),
    "a float counter": (changed(2, np.array(5.0)), "batches is float64 (), not int64 ()"),
    "NaN": (poisoned(np.nan), "fc.weight has 1 non-finite values"),
    "infinity": (poisoned(np.inf, -np.inf), "fc.weight has 2 non-finite values"),
    "all kinds": (poisoned(np.nan, np.inf, -np.inf), "fc.weight has 3 non-finite values"),
}


@pytest.mark.parametrize("update, reason", BAD_UPDATES.values(), ids=BAD_UPDATES)
def test_an_update_that_does_not_fit_is_refused_with_the_reason(update, reason):
    with pytest.raises(BadReply) as error:
        check(update)
    assert str(error.value) == reason


@pytest.mark.parametrize(
    "num_examples", [0, -1, -(2**63), MAX_EXAMPLES + 1, 2**62, True, 1.0, math.nan, "7"]
)
def test_a_number_of_examples_that_cannot_be_is_refused(num_examples):
    with pytest.raises(BadReply) as error:
        check(MODEL, num_examples)
    assert str(error.value) == f"trained on {num_examples} examples"


def test_what_the_device_was_sent_plus_the_delta_is_what_came_back():
    rng = np.random.default_rng(0)
    model = {"w": rng.standard_normal((50, 40)).astype(np.float32), "n": np.array(5)}
    trained = {"w": (model["w"] * np.float32(1.01)).astype(np.float32), "n": np.array(8)}
    update = make_update(trained.values(), model, 100, {"loss": 1.5, "nan": math.nan})
    assert update.delta["w"].dtype == np.float64
    np.testing.assert_array_equal(model["w"] + update.delta["w"], trained["w"].astype(np.float64))
    assert list(update.delta) == ["w"]
    assert update.counters["n"] == 8
    assert (update.num_examples, update.metrics) == (100, {"loss": 1.5})
    assert update.norm == pytest.approx(np.linalg.norm(update.delta["w"]), rel=1e-12)


def test_update_holds_nothing_of_the_bytes_received():
    data = bytearray(MODEL[2].tobytes())
    update = check(changed(2, np.frombuffer(data, MODEL[2].dtype).reshape(())))
    before = int(update.counters["batches"])
    data[:] = b"\xff" * len(data)
    assert update.counters["batches"] == before == 5


def test_norm_of_a_model_leaves_out_its_counters():
    model = {"w": np.full(4, 3.0, np.float32), "b": np.full(2, 4.0), "n": np.array(1000)}
    assert norm_of(model) == pytest.approx(math.sqrt(4 * 9 + 2 * 16))


# --- Bounds ---


def test_middle_number_is_the_lower_one_of_an_even_count():
    assert lower_median([5, 1, 3]) == 3
    assert lower_median([4, 1, 3, 2]) == 2
    assert lower_median([]) == math.inf


def test_norm_limit_is_100_times_the_models_norm_and_then_that_of_earlier_updates():
    model = {"w": np.full(4, 0.5, np.float32)}  # of norm 1
    bounds = Bounds()
    assert bounds.norm_limit(model) == pytest.approx(100)
    bounds.learn([0.1, 0.2, 50.0], [10, 10, 10])
    assert bounds.norm_limit(model) == pytest.approx(20)
    assert Bounds(max_norm=3.0).norm_limit(model) == 3.0
    assert Bounds().norm_limit({"w": np.zeros(3)}) == math.inf


def test_one_device_counts_at_most_so_often_the_usual_number_of_examples():
    bounds = Bounds(max_weight_ratio=2)
    assert bounds.examples_limit([100, 300, 10**9]) == 600
    assert bounds.examples_limit([]) == MAX_EXAMPLES
    assert bounds.examples_limit([0, -5]) == MAX_EXAMPLES
    bounds.learn([], [50] * 10)
    assert bounds.examples_limit([10**9]) == 100


def test_outlier_is_far_from_the_others_and_from_what_is_usual():
    model = {"w": np.full(4, 0.5, np.float32)}
    bounds = Bounds()
    bounds.learn([1.0] * 5, [])
    assert bounds.outliers({"0": 1.0, "1": 1.1, "2": 111.0}, model) == {"2"}
    assert bounds.outliers({"0": 1.0, "1": 1.1, "2": 109.0}, model) == set()
    # A device that sends next to nothing does not make the others look large.
    assert bounds.outliers({"0": 1e-9, "1": 9.0, "2": 1e-9}, model) == set()
    assert Bounds(max_norm=1e9).outliers({"0": 1e-9, "1": 1e8}, model) == set()


def test_bounds_come_back_from_a_checkpoint_and_ignore_what_is_none():
    bounds = Bounds()
    bounds.learn([0.3, 0.1], [20, 10])
    restored = Bounds()
    restored.restore(bounds.state())
    assert restored.state() == bounds.state() == {"norms": [0.1, 0.3], "examples": [10, 20]}
    for bad in ([-1.0], ["1"], [math.nan], [True], None, {"a": 1}):
        restored.restore({"norms": bad, "examples": bad})
    assert restored.state() == bounds.state()


def test_bounds_remember_the_last_200_numbers():
    bounds = Bounds()
    for i in range(300):
        bounds.learn([float(i)], [i])
    assert bounds.norms == [float(i) for i in range(100, 300)]


# --- Metrics ---


def test_finite_numbers_and_short_strings_are_kept_with_their_types():
    metrics = {"loss": 1.5, "images": 25_000, "hot": True, "board": "Raspberry Pi 4", "µ": "°C"}
    kept = clean_metrics(metrics)
    assert kept == metrics
    assert [type(v) for v in kept.values()] == [float, int, bool, str, str]


def test_what_cannot_go_into_a_table_is_left_out():
    assert clean_metrics(
        {
            "nan": np.nan,
            "infinity": float("inf"),
            "bytes": b"\0",
            "list": [1, 2],
            "none": None,
            "clears the screen": "\x1b[2J",
            "two lines": "a\nb",
            "long": "x" * 1001,
            "x" * 101: 1,
            "loss": 1.5,
        }
    ) == {"loss": 1.5}


def test_names_that_cannot_be_shown_are_left_out():
    assert clean_metrics({"\x1b[2J": 1.0, "a\nb": 2.0, "loss": 1.5}) == {"loss": 1.5}


def test_no_more_than_a_hundred_metrics_are_kept():
    kept = clean_metrics({f"metric {i}": i for i in range(1000)})
    assert list(kept.values()) == list(range(100))

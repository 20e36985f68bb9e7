"""What a reply must be before it may touch the global model."""

import numpy as np
import pytest

from federated.errors import BadReply
from federated.updates import MAX_EXAMPLES, check_update, clean_metrics

NAMES = ["fc.weight", "fc.bias", "batches"]
MODEL = [np.zeros((2, 3), np.float32), np.zeros(2, np.float32), np.array(5)]


def check(update, num_examples=100):
    check_update(update, num_examples, MODEL, NAMES)


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


@pytest.mark.parametrize("num_examples", [0, -1, -(2**63), MAX_EXAMPLES + 1, 2**62])
def test_a_number_of_examples_that_cannot_be_is_refused(num_examples):
    with pytest.raises(BadReply) as error:
        check(MODEL, num_examples)
    assert str(error.value) == f"trained on {num_examples} examples"


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

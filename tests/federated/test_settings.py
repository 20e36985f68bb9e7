"""federated/settings.py: ranges, and settings that cross the wire with their types."""

import pytest

from federated.errors import FederationError
from federated.settings import RunSettings, Settings
from plumbing.stream import wire

SETTINGS = Settings(
    lr=0.03,
    lr_end=0.0,
    server_round=3,
    epochs=2,
    round_seconds=1.5,
    batch_size=64,
    momentum=0.0,
    weight_decay=0.001,
    label_smoothing=0.1,
    sampling="balanced",
    augment="crop",
    proximal_mu=0.01,
    partition="dirichlet:0.5",
    num_partitions=5,
    seed=-1,
    run_id="3f",
)


def across_the_wire(config):
    return wire.decode_request(wire.encode_fit([], config)).config


def test_settings_come_back_equal_and_with_their_types():
    arrived = Settings.from_config(across_the_wire(SETTINGS.to_config()), default_lr=1.0)
    assert arrived == SETTINGS
    for name, value in SETTINGS.to_config().items():
        assert type(getattr(arrived, name)) is type(value), name


def test_each_setting_of_the_test_differs_from_its_default():
    defaults = Settings.from_config({}, default_lr=1.0).to_config()
    assert all(value != defaults[name] for name, value in SETTINGS.to_config().items())


def test_a_stock_server_that_sends_nothing_gives_the_defaults():
    arrived = Settings.from_config(across_the_wire({}), default_lr=0.02)
    assert arrived == Settings(lr=0.02, lr_end=0.02)
    assert (arrived.epochs, arrived.batch_size, arrived.partition) == (1, 32, "none")


def test_a_learning_rate_without_an_end_stays_as_it_is():
    assert Settings.from_config({"lr": 0.5}, default_lr=0.02).lr_end == 0.5


def test_whole_numbers_may_stand_for_floats():
    arrived = Settings.from_config(across_the_wire({"lr": 1, "momentum": 0}), default_lr=0.02)
    assert arrived == Settings(lr=1.0, lr_end=1.0, momentum=0.0)
    assert type(arrived.lr) is type(arrived.momentum) is float


def test_keys_of_others_are_left_alone():
    assert Settings.from_config({"round": 1, "x": b"y"}, 0.02) == Settings(lr=0.02, lr_end=0.02)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("epochs", "2", "the server's setting epochs is '2', not of type int"),
        ("epochs", 2.0, "the server's setting epochs is 2.0, not of type int"),
        ("epochs", True, "the server's setting epochs is True, not of type int"),
        ("lr", "0.1", "the server's setting lr is '0.1', not of type float"),
        ("lr", False, "the server's setting lr is False, not of type float"),
        ("partition", 1, "the server's setting partition is 1, not of type str"),
        ("partition", b"iid", "the server's setting partition is b'iid', not of type str"),
    ],
)
def test_a_value_of_another_type_is_refused_and_quoted(name, value, message):
    with pytest.raises(FederationError) as error:
        Settings.from_config(across_the_wire({name: value}), default_lr=0.02)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [0.4, 0.3, 0.2, 0.1, 0.0]),
        ("cosine", [0.4, 0.341421, 0.2, 0.058579, 0.0]),
        ("constant", [0.4, 0.4, 0.4, 0.4, 0.4]),
    ],
)
def test_learning_rate_follows_its_schedule_over_the_rounds(schedule, rates):
    settings = RunSettings(rounds=4, lr=0.4, lr_schedule=schedule)
    rounds = [settings.for_round(r) for r in (1, 2, 3, 4)]
    assert [r.lr for r in rounds] == pytest.approx(rates[:4], abs=1e-6)
    assert [r.lr_end for r in rounds] == pytest.approx(rates[1:], abs=1e-6)


def test_schedule_that_is_none_is_named():
    with pytest.raises(FederationError, match="no --lr_schedule 'step'; choose linear, cosine"):
        RunSettings(lr_schedule="step").check()

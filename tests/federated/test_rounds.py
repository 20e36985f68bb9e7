"""The synchronous schedule, on a fleet in memory: who is asked, what counts, when it ends."""

import itertools
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import flwr.serverapp.strategy
import numpy as np
import pytest

from federated import rounds
from federated.errors import BadReply, FederationError
from federated.rounds import (
    REVOKED,
    Clipped,
    Dropped,
    Job,
    Notice,
    Offered,
    Plan,
    Result,
    Retry,
    Step,
    Waiting,
    synchronous,
)
from federated.strategies import STRATEGIES, Strategy, make_strategy
from federated.updates import Bounds, Weights, make_update, norm_of
from tests.devices import MemoryFleet, adding, in_turn, silent, small_model

HONEST = 0.001  # what honest devices add to each weight


class Run:
    """A run over a fleet in memory, and all that was observed of it."""

    def __init__(
        self,
        fleet: MemoryFleet,
        strategy: str = "FedAvg",
        bounds: Bounds | None = None,
        fraction: float = 1.0,
        evaluate: Callable[[Weights], dict[str, Any]] = lambda weights: {"loss": 1.0},
        **plan: Any,
    ) -> None:
        plan = {"rounds": 1, "min_num_clients": len(fleet.replies), **plan}
        plan.setdefault("min_sample_size", plan["min_num_clients"])
        self.fleet = fleet
        self.bounds = bounds or Bounds()
        self.strategy = make_strategy(strategy, fraction, plan["min_sample_size"])
        self.plan = Plan(
            config=lambda server_round: {"server_round": server_round}, evaluate=evaluate, **plan
        )
        self.events: list[Any] = []
        self.steps: list[Step] = []

    def finish(self) -> "Run":
        for step in synchronous(
            self.fleet, self.strategy, small_model(), self.plan, self.bounds, self.events.append
        ):
            self.steps.append(step)
        return self

    @property
    def dropped(self) -> list[tuple[int, str, str]]:
        events = [event for event in self.events if isinstance(event, Dropped)]
        return [(e.server_round, e.device.name, e.reason) for e in events]

    @property
    def retries(self) -> list[Retry]:
        return [event for event in self.events if isinstance(event, Retry)]

    @property
    def asked(self) -> list[tuple[int, str]]:
        """Rounds and the devices that were asked in them."""
        return sorted((job.version + 1, cid) for cid, job in self.fleet.asked)


def moved(step: Step) -> float:
    """Return how far each weight is from the first, which must be the same for all."""
    first = small_model()
    distance = float(step.weights["b"][0] - first["b"][0])
    for name in ("w", "b"):
        np.testing.assert_allclose(step.weights[name], first[name] + distance, rtol=1e-6)
    return distance


def counted(step: Step) -> list[str]:
    return [contribution.device.name for contribution in step.contributions]


# --- What counts ----------------------------------------------------------------------


def test_round_averages_by_examples():
    run = Run(MemoryFleet({"0": adding(1, 30), "1": adding(5, 10)})).finish()
    (step,) = run.steps
    assert moved(step) == pytest.approx((30 * 1 + 10 * 5) / 40)
    assert list(step.weights) == list(small_model())
    assert [array.dtype for array in step.weights.values()] == [np.float32, np.int64, np.float32]
    assert [c.num_examples for c in step.contributions] == [30, 10]
    assert (step.sampled, step.dropped) == (2, [])
    assert step.evaluation == {"loss": 1.0}


def test_each_round_starts_from_the_one_before():
    run = Run(MemoryFleet({"0": adding(1)}), rounds=3).finish()
    assert [moved(step) for step in run.steps] == pytest.approx([1, 2, 3])
    assert [job.config for _, job in run.fleet.asked] == [{"server_round": r} for r in (1, 2, 3)]


@pytest.mark.parametrize(
    ("step", "num_examples", "reason"),
    [
        (np.nan, 10, "w has 6 non-finite values"),
        (np.inf, 10, "w has 6 non-finite values"),
        (1.0, 0, "trained on 0 examples"),
        (1.0, -5, "trained on -5 examples"),
        (1.0, 2**62, "trained on 4611686018427387904 examples"),
    ],
)
def test_bad_reply_is_dropped_by_name_and_the_others_count(step, num_examples, reason):
    def bad(job):
        floats = {n: a + a.dtype.type(step) if a.dtype.kind == "f" else a
                  for n, a in job.model.items()}  # fmt: skip
        return floats, num_examples

    run = Run(MemoryFleet({"0": adding(1), "1": bad})).finish()
    assert moved(run.steps[0]) == pytest.approx(1)
    assert run.steps[0].dropped == [("device 1", reason)]
    assert run.dropped == [(1, "device 1", reason)]
    assert run.retries == []


def test_round_without_a_usable_reply_is_repeated_and_then_ends_the_run():
    run = Run(MemoryFleet({"0": lambda job: BadReply("no")}), retries=1)
    with pytest.raises(FederationError, match="round 1 brought no new model in 2 attempts"):
        run.finish()
    assert [(r.attempt, r.attempts, r.good_replies) for r in run.retries] == [(1, 2, 0), (2, 2, 0)]
    for _, job in run.fleet.asked:  # the same work, under the same name
        assert job.id == run.fleet.asked[0][1].id
        assert job.id.startswith("1-")
        np.testing.assert_array_equal(job.model["w"], small_model()["w"])


def test_work_from_other_weights_has_another_name():
    """A run may be resumed from an older copy of its directory: offers of then must not count."""
    run = Run(MemoryFleet({"0": adding(1)}), rounds=2, job_id=lambda _: "same").finish()
    names = [job.id for _, job in run.fleet.asked]
    assert len({*names}) == len(names) == 2


def test_device_that_comes_back_just_as_it_is_given_up_is_late_not_busy():
    fleet = MemoryFleet({"0": silent})
    fleet.settle()
    device, job = fleet.devices["0"], Job("1", 0, small_model(), {})
    fleet.start(device, job)
    fleet.leave("0")
    fleet.come_back("0", job)
    fleet.abandon(device, job)  # by a schedule that has seen nothing of it yet
    fleet.settle()
    assert fleet.devices["0"] is not device
    assert fleet.devices["0"].state == "late"


@pytest.mark.parametrize("loss", [None, "low", -5.0, math.nan])
def test_device_without_a_loss_does_not_cost_qfedavg_its_round(loss):
    class Reporting(MemoryFleet):
        def _next(self, timeout):
            event = super()._next(timeout)
            if isinstance(event, Result) and event.device.cid == "1":
                metrics = {} if loss is None else {"loss": loss}
                return replace(event, update=replace(event.update, metrics=metrics))
            return event

    run = Run(Reporting({"0": adding(1), "1": adding(1)}), "QFedAvg").finish()
    ((name, reason),) = run.steps[0].dropped
    assert name == "device 1"
    assert re.fullmatch(r"it reports the training loss .*, which QFedAvg needs", reason)
    assert moved(run.steps[0]) != 0
    assert run.fleet.devices["1"].failures == 1


def test_service_tries_again_later_where_a_run_would_end(monkeypatch):
    monkeypatch.setattr(rounds, "AGAIN_SECONDS", 0.01)
    answers = itertools.chain([BadReply("no")] * 2, itertools.repeat(adding(1)))

    def answer(job):
        given = next(answers)
        return given if isinstance(given, BadReply) else given(job)

    run = Run(MemoryFleet({"0": answer}), retries=1, open_ended=True).finish()
    assert moved(run.steps[0]) == pytest.approx(1)
    (notice,) = (event.text for event in run.events if isinstance(event, Notice))
    assert notice == (
        "round 1 brought no new model in 2 attempts; the reasons are above; again in 0.01 s"
    )


def test_servers_own_training_that_diverges_costs_an_attempt_and_not_the_run():
    def own(server_round, weights):
        own.calls += 1
        if own.calls == 1:
            raise BadReply("w has 6 non-finite values")
        return make_update(weights.values(), weights, 10), 10

    own.calls = 0
    run = Run(MemoryFleet({"0": adding(1)}), retries=1, own=own).finish()
    assert [retry.reason for retry in run.retries] == [
        "the server's own training: w has 6 non-finite values"
    ]
    assert len(run.steps) == 1


def test_training_that_diverges_on_every_device_names_the_learning_rate():
    run = Run(MemoryFleet({"0": adding(np.nan), "1": adding(np.inf)}), retries=1)
    with pytest.raises(FederationError, match=r"in 2 attempts; training diverges$"):
        run.finish()
    run = Run(MemoryFleet({"0": adding(np.nan), "1": lambda job: BadReply("no")}), retries=1)
    with pytest.raises(FederationError, match=r"in 2 attempts; the reasons are above$"):
        run.finish()


def test_attempt_with_too_few_good_replies_leaves_no_trace():
    devices = {"0": adding(1), "1": in_turn(lambda job: BadReply("no"), adding(3))}
    run = Run(MemoryFleet(devices), min_replies=2, retries=1).finish()
    assert moved(run.steps[0]) == pytest.approx(2)
    assert run.steps[0].dropped == [("device 1", "no")]
    assert counted(run.steps[0]) == ["device 0", "device 1"]
    assert [retry.good_replies for retry in run.retries] == [1]


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_follows_its_devices(name):
    fleet = MemoryFleet({str(cid): adding(0.1) for cid in range(5)})
    run = Run(fleet, name, rounds=3).finish()
    weights = small_model()
    for step in run.steps:
        assert len(step.contributions) == 5
        for array, before in ((step.weights[name], weights[name]) for name in ("w", "b")):
            assert (array.shape, array.dtype) == (before.shape, before.dtype)
            assert np.isfinite(array).all()
            assert (array > before).all()  # all devices went up
        weights = step.weights
    configs = [job.config for _, job in fleet.asked]
    assert all(config.get("proximal_mu") == (0.01 if name == "FedProx" else None)
               for config in configs)  # fmt: skip


def test_strategy_that_asks_nobody_ends_the_run():
    run = Run(MemoryFleet({"0": adding(1)}))

    class Nobody(flwr.serverapp.strategy.FedAvg):
        def configure_train(self, *_):
            return []

    run.strategy = Strategy(Nobody())
    with pytest.raises(FederationError, match="round 1 brought no new model"):
        run.finish()


# --- Who is asked ---------------------------------------------------------------------


def test_sample_is_repeatable_and_independent_of_who_came_first():
    samples = []
    for order in ("abcdef", "fedcba"):
        fleet = MemoryFleet({cid: adding(1) for cid in order})
        run = Run(fleet, fraction=0.5, rounds=4, min_sample_size=1, seed=5).finish()
        samples.append(run.asked)
    assert samples[0] == samples[1]
    assert len(samples[0]) == 4 * 3
    assert len({frozenset(cid for r, cid in samples[0] if r == n) for n in (1, 2, 3, 4)}) > 1


def test_round_waits_for_min_num_clients_and_names_how_many_are_here():
    waiting = []

    def note(event):
        if isinstance(event, Waiting):
            waiting.append(event)
            fleet.join(str(event.connected))

    fleet = MemoryFleet({})
    fleet.replies = {"0": adding(1), "1": adding(1)}
    run = Run(fleet)
    list(synchronous(fleet, run.strategy, small_model(), run.plan, None, note))
    assert waiting == [Waiting(2, 0, 0, 0), Waiting(2, 1, 0, 0)]
    assert run.asked == [(1, "0"), (1, "1")]


def test_repeated_round_prefers_devices_that_did_not_fail():
    devices = {cid: adding(1) for cid in "abcd"}
    for bad in "abcd":
        fleet = MemoryFleet({**devices, bad: lambda job: BadReply("no")})
        run = Run(fleet, fraction=0.5, min_sample_size=2, min_replies=2, retries=1, seed=3)
        run.finish()
        asked = [cid for cid, _ in fleet.asked]
        first, again = asked[:2], asked[2:]
        assert bad not in again
        assert len(again) == (2 if bad in first else 0)


def test_repeated_round_asks_as_many_devices_as_before():
    """Also those that failed, if there are no others."""
    devices = {cid: adding(1) for cid in "abcd"}
    devices["b"] = in_turn(lambda job: BadReply("no"), adding(1))
    run = Run(MemoryFleet(devices), min_sample_size=1, min_replies=4, retries=1).finish()
    assert (run.steps[0].sampled, len(run.steps[0].contributions)) == (4, 4)
    assert run.asked == [(1, cid) for cid in "aabbccdd"]


def test_device_is_left_out_after_three_bad_replies_in_a_row_and_not_waited_for():
    fleet = MemoryFleet({"0": adding(1), "1": lambda job: BadReply("no")})
    run = Run(fleet, rounds=5).finish()
    assert [step.sampled for step in run.steps] == [2, 2, 2, 1, 1]
    assert fleet.devices["1"].state == "left out"


def test_good_reply_between_bad_ones_keeps_a_device_in():
    def no(job):
        return BadReply("no")

    fleet = MemoryFleet({"0": adding(1), "1": in_turn(no, no, adding(1), no, no, adding(1))})
    run = Run(fleet, rounds=6).finish()
    assert [step.sampled for step in run.steps] == [2] * 6
    assert [len(step.contributions) for step in run.steps] == [1, 1, 2, 1, 1, 2]


def test_device_that_was_left_out_is_asked_again_when_it_reconnects():
    def no(job):
        return BadReply("no")

    fleet = MemoryFleet({"0": adding(1), "1": in_turn(no, no, no, adding(3))})
    observed = []

    def reconnect(step: Step) -> None:
        observed.append(step.sampled)
        if step.server_round == 4:
            fleet.leave("1")
            fleet.join("1")
            fleet.settle()

    run = Run(fleet, rounds=5)
    for step in synchronous(fleet, run.strategy, small_model(), run.plan):
        reconnect(step)
    assert observed == [2, 2, 2, 1, 2]
    assert counted(step) == ["device 0", "device 1"]


# --- Connections that break -----------------------------------------------------------


def test_device_that_comes_back_with_its_job_in_mid_round_counts():
    def breaks(job):
        fleet.leave("1")
        fleet.replies["1"] = adding(3)
        fleet.come_back("1", job)
        fleet.give(fleet.devices["0"], job, adding(1)(job))  # the last one to be done

    fleet = MemoryFleet({"0": silent, "1": breaks})
    run = Run(fleet).finish()
    assert moved(run.steps[0]) == pytest.approx(2)
    assert counted(run.steps[0]) == ["device 0", "device 1"]
    assert run.dropped == []
    assert len(run.asked) == 2  # it was not asked to train again


def test_device_whose_connection_breaks_is_dropped_when_all_others_are_done():
    fleet = MemoryFleet({"0": adding(1), "1": lambda job: fleet.leave("1")})
    run = Run(fleet).finish()
    assert run.dropped == [(1, "device 1", "the connection broke")]
    assert fleet.abandoned == ["1"]
    assert moved(run.steps[0]) == pytest.approx(1)


def test_broken_connections_are_no_bad_replies():
    def breaks(job):
        fleet.leave("1")
        fleet.join("1")

    fleet = MemoryFleet({"0": adding(1), "1": breaks})
    run = Run(fleet, rounds=5).finish()
    assert [step.sampled for step in run.steps] == [2] * 5


def test_round_in_which_all_connections_break_costs_no_attempt():
    def breaks(job):
        fleet.leave("0")
        fleet.join("0")

    fleet = MemoryFleet({"0": in_turn(breaks, breaks, breaks, adding(1))})
    run = Run(fleet, retries=0).finish()
    assert moved(run.steps[0]) == pytest.approx(1)
    assert run.retries == []
    assert run.dropped == [(1, "device 0", "the connection broke")] * 3


# --- Late devices ---------------------------------------------------------------------


def test_round_in_which_all_connections_break_again_and_again_ends_the_run():
    def breaks(job):
        fleet.leave("0")
        fleet.join("0")

    fleet = MemoryFleet({"0": breaks})
    run = Run(fleet, retries=1)
    with pytest.raises(FederationError, match="round 1 brought no new model in 2 attempts"):
        run.finish()
    assert [retry.reason for retry in run.retries] == [
        "all connections broke, 11 times in this round",
        "all connections broke, 12 times in this round",
    ]


def test_late_device_is_dropped_and_its_late_result_counts_in_no_round():
    fleet = MemoryFleet({"0": adding(1), "1": silent})
    run = Run(fleet, rounds=3, timeout=0.05, min_num_clients=2, min_sample_size=1)
    late = []

    def second(job):
        if job.version == 1:  # its result of round 1 comes in the middle of round 2
            _, first = fleet.asked[0]
            assert first.version == 0
            fleet.give(fleet.devices["1"], first, adding(100)(first))
        late.append(fleet.devices["1"].state)
        return adding(1)(job)

    fleet.replies["0"] = second
    fleet.replies["1"] = in_turn(silent, adding(3))
    run.finish()
    assert run.dropped == [(1, "device 1", "no reply in 0.05 s")]
    assert [counted(step) for step in run.steps] == [
        ["device 0"], ["device 0"], ["device 0", "device 1"],
    ]  # fmt: skip
    assert late[1] == "late"
    assert moved(run.steps[2]) == pytest.approx(1 + 1 + 2)
    assert fleet.abandoned == ["1"]


def test_late_device_is_sampled_again_once_it_is_free():
    waiting = []

    def note(event):
        if isinstance(event, Waiting):
            waiting.append(event)
            fleet.free("1")

    fleet = MemoryFleet({"0": adding(1), "1": in_turn(silent, adding(3))})
    fleet.settle()
    run = Run(fleet, rounds=2, timeout=0.05)
    steps = synchronous(fleet, run.strategy, small_model(), run.plan, None, note)
    assert next(steps).sampled == 2
    assert fleet.idle() == [fleet.devices["0"]]
    assert counted(next(steps)) == ["device 0", "device 1"]
    assert waiting == [Waiting(2, 2, 1, 0)]  # connected, and busy


def test_hung_device_keeps_no_model():
    fleet = MemoryFleet({"0": adding(1), "1": silent})
    Run(fleet, timeout=0.05, min_sample_size=1).finish()
    hung = fleet.devices["1"]
    assert hung.state == "late"
    assert hung.job is None


def test_device_that_is_done_has_as_long_again_to_hand_over_its_update():
    def offers(job):
        fleet.events.append(Offered(fleet.devices["1"], job))

    def note(event):
        if isinstance(event, Dropped):  # the time is over for device 2, which trains still
            job = fleet.asked[0][1]
            fleet.give(fleet.devices["1"], job, adding(3)(job))

    fleet = MemoryFleet({"0": adding(1), "1": offers, "2": silent})
    run = Run(fleet, timeout=0.1)
    (step,) = synchronous(fleet, run.strategy, small_model(), run.plan, None, note)
    assert counted(step) == ["device 0", "device 1"]
    assert step.dropped == [("device 2", "no reply in 0.1 s")]


def test_device_that_offered_its_update_is_waited_for_beyond_the_timeout():
    def offered(job):
        device = fleet.devices["1"]
        fleet.events.append(Offered(device, job))
        later = Result(device, job, None, "offered its update, then sent nothing for 6 s")
        threading.Timer(0.5, fleet.events.append, [later]).start()

    fleet = MemoryFleet({"0": adding(1), "1": offered, "2": silent})
    start = time.monotonic()
    run = Run(fleet, timeout=0.1).finish()
    assert run.dropped == [
        (1, "device 2", "no reply in 0.1 s"),
        (1, "device 1", "offered its update, then sent nothing for 6 s"),
    ]
    assert 0.5 <= time.monotonic() - start < 5
    assert fleet.abandoned == ["2"]


def test_device_that_offered_and_is_back_without_its_update_has_until_the_next_timeout():
    def offered(job):
        fleet.events.append(Offered(fleet.devices["1"], job))
        fleet.leave("1")
        fleet.replies["1"] = silent
        fleet.come_back("1", job)

    fleet = MemoryFleet({"0": adding(1), "1": offered})
    run = Run(fleet, timeout=0.1).finish()
    assert run.dropped == [(1, "device 1", "no reply in 0.1 s")]


# --- Revoked --------------------------------------------------------------------------


def test_device_revoked_while_it_trains_is_dropped_and_the_others_count():
    def revoked(job):
        fleet.events.append(Result(fleet.devices["1"], job, None, REVOKED))
        fleet.leave("1", REVOKED)

    fleet = MemoryFleet({"0": adding(1), "1": revoked})
    run = Run(fleet).finish()
    assert run.dropped == [(1, "device 1", "it was revoked")]
    assert moved(run.steps[0]) == pytest.approx(1)
    assert len(run.asked) == 2


def test_update_of_a_device_revoked_after_it_replied_counts_in_no_round():
    def revoked(job):
        fleet.revoked_cids.add("1")
        return adding(100)(job)

    fleet = MemoryFleet({"0": adding(1), "1": revoked})
    fleet.settle()
    run = Run(fleet, min_num_clients=1, min_sample_size=2, retries=0).finish()
    assert moved(run.steps[0]) == pytest.approx(1)
    assert counted(run.steps[0]) == ["device 0"]
    assert run.steps[0].dropped == [("device 1", "it was revoked")]
    assert run.asked == [(1, "0"), (1, "0"), (1, "1")]
    assert run.retries == []  # it costs no attempt: nobody else did wrong


def test_round_waits_for_another_device_in_place_of_a_revoked_one():
    def revoked(job):
        fleet.revoked_cids.add("1")
        fleet.join("2")
        return adding(100)(job)

    fleet = MemoryFleet({"0": adding(1), "1": revoked})
    fleet.replies["2"] = adding(3)
    run = Run(fleet, min_num_clients=2).finish()
    assert counted(run.steps[0]) == ["device 0", "device 2"]
    assert run.steps[0].sampled == 2


# --- Attempts that bring no new model -------------------------------------------------

STATEFUL = ["FedAvgM", "FedAdam", "FedYogi", "FedAdagrad"]


def two_rounds(strategy: str, answers: Sequence[float], **options: Any) -> Run:
    """Run two honest devices; in round 2 one of them adds each of `answers` in turn."""
    second = in_turn(adding(HONEST), *map(adding, answers))
    fleet = MemoryFleet({"0": adding(2 * HONEST), "1": second})
    return Run(fleet, strategy, Bounds(max_norm=1e35), rounds=2, **options).finish()


def assert_equal_runs(run: Run, other: Run) -> None:
    for a, b in zip(run.steps, other.steps, strict=True):
        for name, array in a.weights.items():
            assert array.tobytes() == b.weights[name].tobytes(), name
    (arrays, rest), (other_arrays, other_rest) = run.strategy.state(), other.strategy.state()
    assert rest == other_rest
    assert arrays.keys() == other_arrays.keys()
    for name in arrays:
        assert arrays[name].tobytes() == other_arrays[name].tobytes(), name
    assert run.bounds.state() == other.bounds.state()


@pytest.mark.parametrize("strategy", STATEFUL)
def test_retry_after_an_endless_loss_equals_a_run_that_never_saw_the_bad_reply(strategy):
    losses = iter((1.0, math.inf, math.nan, 1.0))
    run = two_rounds(
        strategy,
        [1e10, 1e15, HONEST],
        evaluate=lambda weights: {"loss": next(losses)},
        retries=2,
    )
    never = two_rounds(strategy, [HONEST])
    assert [retry.reason for retry in run.retries] == [
        "the new model's test loss is inf",
        "the new model's test loss is nan",
    ]
    assert_equal_runs(run, never)


@pytest.mark.parametrize(
    "strategy", ["FedAvgM:server_learning_rate=1e20", "FedAdam", "FedYogi", "FedAdagrad"]
)
def test_retry_after_an_overflow_equals_a_run_that_never_saw_the_bad_reply(strategy):
    with np.errstate(over="ignore", invalid="ignore"):
        run = two_rounds(strategy, [1e25, HONEST], retries=1)
    never = two_rounds(strategy, [HONEST])
    assert [retry.reason for retry in run.retries] == ["the new model has non-finite values"]
    assert_equal_runs(run, never)


def test_interrupted_round_leaves_the_strategy_as_it_was():
    def interrupted(weights: Weights) -> dict[str, Any]:
        raise KeyboardInterrupt

    run = Run(MemoryFleet({"0": adding(1)}), "FedAvgM", evaluate=interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    arrays, rest = run.strategy.state()
    assert (arrays, rest) == ({}, {})


# --- Bounds ---------------------------------------------------------------------------


def test_update_beyond_the_models_norm_is_refused_in_round_1():
    limit = 100 * norm_of(small_model())
    fleet = MemoryFleet({"0": adding(1), "1": adding(limit), "2": adding(1)})
    run = Run(fleet).finish()
    ((_, name, reason),) = run.dropped
    assert name == "device 1"
    norm = limit * math.sqrt(8)
    assert reason == (
        f"its update has norm {norm:.3g}, above the limit of {limit:.3g}; "
        "--max_update_norm sets another limit"
    )
    assert moved(run.steps[0]) == pytest.approx(1)


def test_update_beyond_the_usual_norm_is_refused_in_later_rounds():
    """What passes in round 1, compared with the model, is too far once updates are known."""
    devices = {cid: adding(HONEST) for cid in "0123"}
    far = 200 * HONEST
    run = Run(MemoryFleet({**devices, "4": in_turn(adding(HONEST), adding(far))}), rounds=2)
    run.finish()
    usual = HONEST * math.sqrt(8)
    assert run.dropped == [
        (
            2,
            "device 4",
            f"its update has norm {200 * usual:.3g}, above the limit of {100 * usual:.3g}; "
            "--max_update_norm sets another limit",
        )
    ]
    assert run.retries == []
    # In round 1, the same passes.
    run = Run(MemoryFleet({**devices, "4": adding(far)}), bounds=Bounds()).finish()
    assert run.dropped == []


def test_max_update_norm_replaces_what_is_learned():
    fleet = MemoryFleet({"0": adding(1), "1": adding(3)})
    run = Run(fleet, bounds=Bounds(max_norm=2 * math.sqrt(8))).finish()
    assert run.dropped == [
        (
            1,
            "device 1",
            f"its update has norm {3 * math.sqrt(8):.3g}, above the limit of "
            f"{2 * math.sqrt(8):.3g}; --max_update_norm sets another limit",
        )
    ]
    run = Run(MemoryFleet({"0": adding(1), "1": adding(3)}), bounds=Bounds(max_norm=1e9)).finish()
    assert run.dropped == []


def test_outlier_of_a_round_is_excluded_and_the_round_repeated_without_it():
    fleet = MemoryFleet({"0": adding(1e-4), "1": adding(1e-4), "2": adding(30)})
    run = Run(fleet, retries=1).finish()
    ((_, name, reason),) = run.dropped
    norm = 30 * math.sqrt(8)
    assert name == "device 2"
    assert reason == (
        f"its update has norm {norm:.3g}, out of proportion to the others of this round"
    )
    assert [retry.reason for retry in run.retries] == [
        "the round is repeated without an update that is out of proportion"
    ]
    assert sorted(cid for cid, _ in fleet.asked[3:]) == ["0", "1"]
    assert moved(run.steps[0]) == pytest.approx(1e-4, rel=1e-2)


def test_outliers_three_times_in_a_row_leave_a_device_out():
    fleet = MemoryFleet({"0": adding(1e-4), "1": adding(1e-4), "2": adding(30)})
    # A bound that learns nothing: each round is like the first.
    bounds = Bounds()
    bounds.learn = lambda norms, examples: None
    run = Run(fleet, bounds=bounds, rounds=5, retries=1).finish()
    assert len(run.dropped) == 3
    assert fleet.devices["2"].left_out
    assert [step.sampled for step in run.steps] == [2] * 5
    assert [retry.server_round for retry in run.retries] == [1, 2, 3]


def test_device_that_sends_next_to_nothing_makes_no_outlier_of_the_others():
    run = Run(MemoryFleet({"0": adding(1e-6), "1": adding(0.5), "2": adding(0.5)})).finish()
    assert run.dropped == []
    run = Run(MemoryFleet({"0": adding(1e-6), "1": adding(0.5)})).finish()
    assert run.dropped == []


def test_device_that_returns_the_model_unchanged_makes_no_outlier_of_the_others():
    fleet = MemoryFleet({"0": adding(0), "1": in_turn(silent, adding(0.5))})
    run = Run(fleet, rounds=2, timeout=0.1)
    steps = synchronous(fleet, run.strategy, small_model(), run.plan, None, run.events.append)
    assert counted(next(steps)) == ["device 0"]  # all that is known then is an update of 0
    fleet.free("1")
    assert counted(next(steps)) == ["device 0", "device 1"]


def test_device_that_claims_far_more_examples_than_usual_counts_in_part_and_is_named():
    fleet = MemoryFleet(
        {"0": adding(1, 100), "1": adding(1, 100), "2": adding(4, 1_000_000)},
        {"0": {"images": 100}, "1": {"images": 100}, "2": {"images": 1_000_000}},
    )
    run = Run(fleet).finish()
    (clipped,) = [event for event in run.events if isinstance(event, Clipped)]
    assert (clipped.server_round, clipped.device.name) == (1, "device 2")
    assert (clipped.num_examples, clipped.counted_examples) == (1_000_000, 2000)
    contribution = run.steps[0].contributions[2]
    assert (contribution.num_examples, contribution.counted_examples) == (1_000_000, 2000)
    assert moved(run.steps[0]) == pytest.approx((200 * 1 + 2000 * 4) / 2200, rel=1e-5)


def test_max_weight_ratio_holds_from_round_to_round():
    second = in_turn(adding(1, 100), adding(1, 1_000_000))
    fleet = MemoryFleet({"0": adding(1, 100), "1": second})
    run = Run(fleet, bounds=Bounds(max_weight_ratio=3), rounds=2).finish()
    counts = [[c.counted_examples for c in step.contributions] for step in run.steps]
    assert counts == [[100, 100], [100, 300]]  # in round 1 nothing is known of either

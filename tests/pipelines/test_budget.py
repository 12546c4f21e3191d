"""How long a training lasts: minutes become steps, small images get their share of the time, the rate falls with it."""
from __future__ import annotations

import pytest

from pipelines import budget as module
from pipelines.budget import Budget, lr_factor, to_steps
from pipelines.settings import TrainSettings


class FakeFeed:
    """Steps of its first part, if it has one, are said to cost so much of one at full size."""

    mine, batch_size, workers = (0,), 2, 4

    def __init__(self, first_cost: float = 1.0):
        self.cost, self.first = first_cost, None if first_cost == 1 else "smaller"

    def first_cost(self) -> float:
        return self.cost

    def steps_per_epoch(self) -> float:
        return 7.5


@pytest.fixture
def clock(monkeypatch):
    """Now, and the seconds that steps took at smaller images and at full size."""
    told = {"now": 0.0, "small": 0.0, "full": 0.0}
    monkeypatch.setattr(module.time, "monotonic", lambda: told["now"])
    return told


def train(budget: Budget, clock, full: float, small: float = 0.0, first: int = 0, last: int | None = None) -> list[int]:
    """Train from a step on, to the end or the last, with steps that take so many seconds -> where AP is measured."""
    step, validations = first, []
    while not budget.is_spent(step) and step != last:
        clock["now"] += 7  # validations and checkpoints do not count
        budget.start()
        is_small = small and (budget.full_from is None or step < budget.full_from)
        seconds = small if is_small else full(step) if callable(full) else full
        clock["now"] += seconds
        clock["small" if is_small else "full"] += seconds
        step += 1
        budget.tick(step)
        if budget.validation_is_due(step):
            validations.append(step)
    return validations


@pytest.mark.parametrize(("budget", "steps"), [("40 steps", 40), ("4 epochs", 30), ("1 epoch", 8), ("100 images", 13)])
def test_a_budget_in_steps_epochs_or_images_is_known_at_once(tmp_path, budget, steps):
    assert Budget(TrainSettings(budget=budget), FakeFeed(), tmp_path).steps == steps


@pytest.mark.parametrize(("seconds", "a_step"), [(1000, 0.25), (100, 0.25), (30, 1.0), (3, 1.0), (1, 5.0)])
def test_minutes_become_steps_and_are_remembered(tmp_path, clock, seconds, a_step):
    options = TrainSettings(budget=f"{seconds} seconds")
    budget = Budget(options, FakeFeed(), tmp_path)
    assert budget.share(0) is None and not budget.validation_is_due(1)
    train(budget, clock, a_step)
    assert clock["full"] == pytest.approx(seconds, rel=0.06, abs=2 * a_step)
    again = Budget(options, FakeFeed(), tmp_path, budget.steps)  # as after a kill
    assert (again.steps, again.full_from, again.share(3)) == (budget.steps, budget.full_from, budget.share(3))


def test_slow_first_steps_do_not_count_as_the_pace(tmp_path, clock):
    budget, step = Budget(TrainSettings(budget="200 seconds"), FakeFeed(), tmp_path), 0
    while budget.steps is None:
        budget.start()
        clock["now"] += 5.0 if step < 5 else 0.25
        step += 1
        budget.tick(step)
    assert 20 < 5 * 5 <= clock["now"] < 200 / 6  # before the first of six validations is due
    assert 25 + (budget.steps - 5) * 0.25 * module.SLACK == pytest.approx(200, rel=0.05)


@pytest.mark.parametrize("cost", [0.25, 0.5, 0.9])
@pytest.mark.parametrize(("seconds", "full"), [(1000, 1.0), (300, 1.0), (60, 1.0), (30, 0.5)])
def test_images_are_small_for_their_share_of_the_time(tmp_path, clock, seconds, full, cost):
    """Also where a step at full size costs more or less than was thought."""
    options = TrainSettings(budget=f"{seconds} seconds", first_share=0.6)
    budget = Budget(options, FakeFeed(0.4), tmp_path)
    validations = train(budget, clock, full, full * cost)
    whole = clock["small"] + clock["full"]
    assert whole == pytest.approx(seconds, rel=0.1) and clock["small"] / whole == pytest.approx(0.6, abs=0.1)
    assert 0 < budget.full_from < budget.steps == validations[-1] and len(validations) <= options.validations
    again = Budget(options, FakeFeed(0.4), tmp_path, budget.steps)
    assert (again.steps, again.full_from) == (budget.steps, budget.full_from)


@pytest.mark.parametrize("stop", [150, 400, 700])
@pytest.mark.parametrize(("first_cost", "cost"), [(0.2, 0.9), (0.4, 0.25), (1.0, 1.0)])
def test_killed_before_minutes_become_steps_once_more_it_ends_where_it_would_have(
    tmp_path, clock, first_cost, cost, stop
):
    """The pace changes on the way, as where mosaics begin."""
    options, a_step = TrainSettings(budget="800 seconds"), (lambda step: 0.8 if step < 200 else 1.0)
    feed, small = FakeFeed(first_cost), 0.8 * cost if first_cost < 1 else 0
    straight, killed = (Budget(options, feed, tmp_path / name) for name in "ab")
    for name in "ab":
        (tmp_path / name).mkdir()
    train(straight, clock, a_step, small)
    assert clock["small"] + clock["full"] == pytest.approx(800, rel=0.1)
    train(killed, clock, a_step, small, last=stop)
    kept = dict(killed.state)  # as in the checkpoint of this step
    train(killed, clock, a_step, small, stop, stop + 30)  # and these steps are lost
    after = Budget(options, feed, tmp_path / "b", stop, kept)
    train(after, clock, a_step, small, stop)
    assert after.steps == pytest.approx(straight.steps, rel=0.02)


@pytest.mark.parametrize("plan", [0, 1])
@pytest.mark.parametrize("slower", [0.3, 1.0, 3.0])
def test_steps_done_again_around_a_decision_have_the_same_share_and_the_same_decision(tmp_path, clock, slower, plan):
    """The decision came after the last checkpoint, and the machine's pace is another when its steps are done again."""
    options, feed = TrainSettings(budget="800 seconds"), FakeFeed(0.5)
    straight = Budget(options, feed, tmp_path)
    train(straight, clock, 1.0, 0.6)
    decided = straight.plans[plan]["after"]
    (tmp_path / "a").mkdir()
    killed = Budget(options, feed, tmp_path / "a")
    train(killed, clock, 1.0, 0.6, last=decided - 10)
    kept, shares = dict(killed.state), {}
    for step in range(decided - 10, decided + 10):
        shares[step] = killed.share(step)
        train(killed, clock, 1.0, 0.6, step, step + 1)
    after = Budget(options, feed, tmp_path / "a", decided - 10, kept)
    for step, share in shares.items():
        assert after.share(step) == share
        train(after, clock, slower, 0.6 * slower, step, step + 1)
    assert after.plans == killed.plans and len(after.plans) == plan + 1
    assert (after.steps, after.full_from) == (killed.steps, killed.full_from)


@pytest.mark.parametrize("wanted", [1, 2, 4, 6])
@pytest.mark.parametrize("slower", [0.5, 1.3, 2.0])
def test_no_validation_is_lost_or_done_twice_where_the_pace_changes(tmp_path, clock, wanted, slower):
    options = TrainSettings(budget="400 seconds", validations=wanted)
    budget = Budget(options, FakeFeed(), tmp_path)
    validations = train(budget, clock, lambda step: 0.5 if step < 150 else 0.5 * slower)
    assert wanted - (slower > 1.5) <= len(validations) <= wanted  # two marks may be passed at once
    assert validations[-1] == budget.steps and len(set(validations)) == len(validations)
    assert wanted == 1 or validations[0] < 0.8 * budget.steps


def test_steps_told_are_shared_by_what_they_cost(tmp_path):
    """Steps at full size take four times as long, so that 0.6 of the time are six sevenths of the steps."""
    told = Budget(TrainSettings(budget="700 steps", first_share=0.6), FakeFeed(0.25), tmp_path)
    assert told.full_from == 600
    assert told.share(300) == pytest.approx(0.3) and told.share(600) == pytest.approx(0.6)
    assert told.share(650) == pytest.approx(0.8) and told.share(700) == 1
    assert Budget(TrainSettings(budget="700 steps", first_share=0.0), FakeFeed(0.25), tmp_path).full_from == 0
    assert Budget(TrainSettings(budget="700 steps"), FakeFeed(), tmp_path).full_from == 0


def test_validations_are_spread_evenly_over_the_time_and_the_last_step_has_one(tmp_path):
    for total, wanted in ((100, 5), (101, 5), (7, 6), (3, 6), (1, 4)):
        budget = Budget(TrainSettings(budget=f"{total} steps", validations=wanted), FakeFeed(), tmp_path)
        steps = [s for s in range(1, total + 1) if budget.validation_is_due(s)]
        assert steps[-1] == total and len(steps) == min(total, wanted)
    budget = Budget(TrainSettings(budget="700 steps", validations=5), FakeFeed(0.25), tmp_path)
    assert [s for s in range(1, 701) if budget.validation_is_due(s)] == [200, 400, 600, 650, 700]


def test_lengths_become_steps_of_all_workers():
    lengths = {"100 steps": 100, "0 steps": 0, "2 epochs": 15, "0.5 epochs": 4, "80 images": 10, "81 images": 11}
    assert {length: to_steps(length, FakeFeed()) for length in lengths} == lengths
    with pytest.raises(ValueError, match="'5 minutes' is not a length such as '100 steps'"):
        to_steps("5 minutes", FakeFeed())


def test_the_learning_rate_warms_up_and_falls():
    options = TrainSettings(warmup="10 steps", lr_flat=0.4)
    factors = [lr_factor(step, step / 100, options, FakeFeed()) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) <= 1
    assert factors[10:41] == [1.0] * 31 and factors[41] < 1
    assert factors[10:] == sorted(factors[10:], reverse=True) and factors[70] == pytest.approx(0.51)
    assert factors[-1] < 0.03 and lr_factor(50, None, options, FakeFeed()) == 1
    step = TrainSettings(warmup="0 steps", lr_schedule="step", lr_drop=0.8)
    assert [lr_factor(s, s / 10, step, FakeFeed()) for s in (0, 7, 8, 9)] == [1.0, 1.0, 0.1, 0.1]
    assert lr_factor(9, None, step, FakeFeed()) == 1


@pytest.mark.parametrize(("warmup", "steps"), [("2 epochs", 15), ("40 images", 5)])
def test_the_warm_up_may_be_told_in_epochs_or_images(warmup, steps):
    options = TrainSettings(warmup=warmup)
    factors = [lr_factor(step, 0.0, options, FakeFeed()) for step in range(steps + 2)]
    assert factors == pytest.approx([(step + 1) / steps for step in range(steps)] + [1.0, 1.0])


@pytest.mark.parametrize(("drop", "steps"), [("12 steps", 12), ("2 epochs", 15), ("100 images", 13)])
def test_the_drop_may_come_after_a_length_whatever_the_training_lasts(drop, steps):
    options = TrainSettings(warmup="0 steps", lr_schedule="step", lr_drop=drop)
    for share in (None, 0.01, 0.99):
        assert [lr_factor(step, share, options, FakeFeed()) for step in (0, steps - 1, steps, 99)] == [1, 1, 0.1, 0.1]


@pytest.mark.parametrize("told", [{}, {"lr_schedule": "step", "lr_drop": "20 steps"}])
@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("sqrt", 2), ("linear", 4)])
def test_the_learning_rate_may_grow_with_the_number_of_workers(told, scaling, factor):
    one, four = (TrainSettings(num_workers=workers, lr_scaling=scaling, **told) for workers in (1, 4))
    for step, share in ((0, None), (5, 0.1), (40, 0.9)):
        expected = factor * lr_factor(step, share, one, FakeFeed())
        assert lr_factor(step, share, four, FakeFeed()) == pytest.approx(expected)

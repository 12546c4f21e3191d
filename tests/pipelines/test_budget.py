"""How long a training lasts: minutes become steps, small images get their share of the time, the rate falls with it."""
from __future__ import annotations

import pytest

from pipelines import budget as module
from pipelines.budget import Budget, lr_factor
from pipelines.settings import TrainSettings


class FakeFeed:
    """Steps of its first part, if it has one, are said to cost so much of one at full size."""

    rank = 0

    def __init__(self, first_cost: float = 1.0):
        self.cost, self.first = first_cost, None if first_cost == 1 else "smaller"

    def first_cost(self) -> float:
        return self.cost

    def steps_per_epoch(self) -> float:
        return 7.5


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def train(budget: Budget, clock, full: float, small: float = 0.0) -> tuple[float, float]:
    """Train to the end with steps that take so many seconds -> seconds at smaller images, and in all."""
    step, spent = 0, [0.0, 0.0]
    while not budget.is_spent(step):
        clock[0] += 7  # validations and checkpoints do not count
        budget.start()
        is_small = small and (budget.full_from is None or step < budget.full_from)
        seconds = small if is_small else full
        clock[0] += seconds
        spent[not is_small] += seconds
        step += 1
        budget.tick(step)
    return spent[0], sum(spent)


@pytest.mark.parametrize(("budget", "steps"), [("40 steps", 40), ("4 epochs", 30)])
def test_a_budget_in_steps_or_epochs_is_known_at_once(tmp_path, budget, steps):
    assert Budget(TrainSettings(budget=budget), FakeFeed(), tmp_path).steps == steps


@pytest.mark.parametrize(("seconds", "a_step"), [(1000, 0.25), (100, 0.25), (30, 1.0), (3, 1.0), (1, 5.0)])
def test_minutes_become_steps_and_are_remembered(tmp_path, clock, seconds, a_step):
    options = TrainSettings(budget=f"{seconds} seconds")
    budget = Budget(options, FakeFeed(), tmp_path)
    assert budget.share(0) is None and not budget.is_validation(1)
    assert train(budget, clock, a_step)[1] == pytest.approx(seconds, rel=0.06, abs=2 * a_step)
    again = Budget(options, FakeFeed(), tmp_path)  # as after a kill
    assert (again.steps, again.full_from, again.share(3)) == (budget.steps, budget.full_from, budget.share(3))


def test_slow_first_steps_do_not_count_as_the_pace(tmp_path, clock):
    budget, step = Budget(TrainSettings(budget="200 seconds"), FakeFeed(), tmp_path), 0
    while budget.steps is None:
        budget.start()
        clock[0] += 5.0 if step < 5 else 0.25
        step += 1
        budget.tick(step)
    assert step == module.MEASURE_TO
    assert 25 + (budget.steps - 5) * 0.25 * module.SLACK == pytest.approx(200, rel=0.05)


@pytest.mark.parametrize("cost", [0.25, 0.5, 0.9])
@pytest.mark.parametrize(("seconds", "full"), [(1000, 1.0), (300, 1.0), (60, 1.0), (30, 0.5)])
def test_images_are_small_for_their_share_of_the_time(tmp_path, clock, seconds, full, cost):
    """Also where a step at full size costs more or less than was thought."""
    options = TrainSettings(budget=f"{seconds} seconds", first_share=0.6)
    budget = Budget(options, FakeFeed(0.4), tmp_path)
    small, whole = train(budget, clock, full, full * cost)
    assert whole == pytest.approx(seconds, rel=0.1) and small / whole == pytest.approx(0.6, abs=0.1)
    assert 0 < budget.full_from < budget.steps
    again = Budget(options, FakeFeed(0.4), tmp_path)
    assert (again.steps, again.full_from) == (budget.steps, budget.full_from)


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
        steps = [s for s in range(1, total + 1) if budget.is_validation(s)]
        assert steps[-1] == total and len(steps) == min(total, wanted)
    budget = Budget(TrainSettings(budget="700 steps", validations=5), FakeFeed(0.25), tmp_path)
    assert [s for s in range(1, 701) if budget.is_validation(s)] == [200, 400, 600, 650, 700]


def test_the_learning_rate_warms_up_and_falls():
    options = TrainSettings(warmup_steps=10, lr_flat=0.4)
    factors = [lr_factor(step, step / 100, options) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) <= 1
    assert factors[10:41] == [1.0] * 31 and factors[41] < 1
    assert factors[10:] == sorted(factors[10:], reverse=True) and factors[70] == pytest.approx(0.51)
    assert factors[-1] < 0.03 and lr_factor(50, None, options) == 1
    step = TrainSettings(warmup_steps=0, lr_schedule="step", lr_drop=0.8)
    assert [lr_factor(s, s / 10, step) for s in (0, 7, 8, 9)] == [1.0, 1.0, 0.1, 0.1]

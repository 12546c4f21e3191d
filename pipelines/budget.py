"""How long a training lasts: its steps, those at smaller images among them, its validations and its learning rate."""
from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.feed import Feed
from pipelines.settings import TrainSettings, parse_budget, parse_length
from pipelines.stage import read_json, write_json
from pipelines.storage import join
from pipelines.workers import of_first_worker

MEASURE_FROM, MEASURE_TO = 20, 120  # steps whose speed turns a budget in minutes into steps
SLACK = 1.1  # a step takes this much longer on average than at the median


class Budget:
    """When training ends, validates and sees images at full size, in steps.

    Minutes become steps after a measured warm-up, and once more later, when the pace of the rest is known: in the first
    part at smaller images that of full size is only guessed, and mosaics come after some epochs. What was decided after
    which step is kept in a file, and what was spent in the checkpoints (`state`), so that a training that goes on after
    a stop decides the same again.
    """

    def __init__(
        self, options: TrainSettings, feed: Feed, folder: Path | str, step: int = 0,
        state: dict[str, float] | None = None,
    ):  # fmt: skip
        amount, unit = parse_budget(options.budget)
        self.validations, self.leads = options.validations, 0 in feed.mine
        self.file = join(folder, "budget.json")
        self.seconds = amount if unit == "seconds" else None
        self.part = options.first_share if feed.first else 0.0
        self.cost = feed.first_cost()  # of a step of the first part, one at full size costing 1
        self.steps: int | None = None
        self.full_from: int | None = None if self.part else 0
        self.again: int | None = None  # the step after which minutes become steps once more
        # Seconds that steps took, those of the first part apart; validations done.
        self.state = {"spent": 0.0, "small": 0.0, "validations": 0, **(state or {})}
        self.durations: list[float] = []  # of the part that is measured
        self.began = time.monotonic()
        self.plans: list[dict[str, Any]] = []  # made so far, in this start or one before
        if unit == "seconds":
            with suppress(FileNotFoundError):
                known = read_json(self.file)
                self.plans = known.get("plans") or [{"after": 0, **known}]  # format 2 had the last one
            for plan in self.plans:
                if plan["after"] <= step:
                    self._adopt(plan)
        else:
            self.steps = to_steps(options.budget, feed)
            self.full_from = round(self.steps * self.part / (self.part + (1 - self.part) * self.cost))

    @property
    def last_step(self) -> int | None:
        """The number of steps where it is final."""
        return None if self.again else self.steps

    def start(self) -> None:
        """Called before every step, and before its batch is awaited."""
        self.began = time.monotonic()

    def tick(self, step: int) -> None:
        """Called after every step, with the number of steps so far."""
        if self.seconds is None or (self.steps is not None and self.again is None):
            return
        duration = time.monotonic() - self.began
        small = self.full_from is None or step <= self.full_from
        self.state["spent"] += duration
        self.state["small"] += duration * small
        if self.steps is None or not small:
            self.durations.append(duration)
        if self.steps is not None and step != self.again:
            return
        if plan := of_first_worker(self._known_plan(step) or self._new_plan(step)):  # at the same steps on all
            self._adopt(plan)
            if self.leads and plan not in self.plans:
                self.plans.append(plan)
                write_json(self.file, {"format": 3, "plans": self.plans})

    def _adopt(self, plan: dict[str, Any]) -> None:
        self.steps, self.full_from, self.cost, self.again = (
            plan[key] for key in ("steps", "full_from", "cost", "again")
        )
        self.durations.clear()

    def _known_plan(self, step: int) -> dict[str, Any] | None:
        """What was decided after this step before a stop."""
        return next((plan for plan in self.plans if plan["after"] == step), None)

    def _new_plan(self, step: int) -> dict[str, Any] | None:
        """What the pace so far leads to, where it is time to decide and a start before this one has not."""
        first = self.steps is None
        if first and self.plans:  # it comes at the step where it came before
            return None
        found = self._plan(step) if first else self._plan_again(step)
        if found is None:
            return None
        steps, full_from, cost = found
        rest = steps - full_from
        at = full_from + min(MEASURE_TO, max(1, rest // 4)) if self.part else steps // 2
        again = at if first and step < at < steps else None
        return {"after": step, "steps": steps, "full_from": full_from, "cost": cost, "again": again}

    def share(self, step: int) -> float | None:
        """The share of the training that is over after so many steps, by the time they take; None while unknown."""
        if self.steps is None:
            return None

        def spent(steps: int) -> float:
            return min(steps, self.full_from) * self.cost + max(0, steps - self.full_from)

        return spent(step) / spent(self.steps)

    def is_spent(self, step: int) -> bool:
        return self.steps is not None and step >= self.steps

    def validation_is_due(self, step: int) -> bool:
        """Asked after every step: evenly spread over the time, the last at the end."""
        if self.steps is None:
            return False
        mark = math.floor(self.share(step) * self.validations)
        due = mark > self.state["validations"] or step == self.steps
        self.state["validations"] = max(mark, self.state["validations"])
        return due

    def _plan(self, step: int) -> tuple[int, int, float] | None:
        """Steps, those of them at smaller images, and what these cost; None while the pace is still measured."""
        elapsed = self.state["spent"]
        # Known before the first validation is due, so that it comes at its share of the time.
        if step < MEASURE_TO and elapsed <= min(0.5 * (self.part or 1), 0.8 / self.validations) * self.seconds:
            return None
        # The median: the first steps, and those beside which images are prepared, are slower than most.
        measured = self.durations[MEASURE_FROM:] if step > 2 * MEASURE_FROM else self.durations
        pace = SLACK * max(float(np.median(measured)), 1e-6)
        if not self.part:
            return step + _whole((self.seconds - elapsed) / pace), 0, self.cost
        full_from = step + _whole((self.part * self.seconds - elapsed) / pace)
        return full_from + _whole((1 - self.part) * self.seconds * self.cost / pace), full_from, self.cost

    def _plan_again(self, step: int) -> tuple[int, int, float]:
        """The same with what is known by now."""
        known = self.durations[MEASURE_FROM:] if len(self.durations) > 2 * MEASURE_FROM else self.durations
        pace = max(float(np.mean(known)), 1e-6)
        cost = self.state["small"] / self.full_from / pace if self.full_from else self.cost
        return step + _whole((self.seconds - self.state["spent"]) / pace), self.full_from, cost


def to_steps(length: str, feed: Feed) -> int:
    """The steps that a length in steps, epochs or images takes with the feed's workers, the last of them whole.

    Raises ValueError as `parse_length`.
    """
    amount, unit = parse_length(length)
    steps = {
        "steps": amount, "epochs": amount * feed.steps_per_epoch(), "images": amount / (feed.batch_size * feed.workers)
    }  # fmt: skip
    return math.ceil(steps[unit])


def lr_factor(step: int, share: float | None, options: TrainSettings, feed: Feed) -> float:
    """What the learning rates are multiplied with at a step: for the workers, linear warm-up, then the schedule.

    share: of the training that is over before the step. While that is not known (a budget in minutes being measured)
    the schedule is at its start, but for a drop after a length of its own.
    """
    warmup = to_steps(options.warmup, feed)
    factor = options.rate_factor() * (min(1.0, (step + 1) / warmup) if warmup else 1.0)
    if options.lr_schedule == "step":
        if isinstance(options.lr_drop, str):
            dropped = step >= to_steps(options.lr_drop, feed)
        else:
            dropped = share is not None and share >= options.lr_drop
        return factor * (0.1 if dropped else 1.0)
    if share is None:
        return factor
    fallen = min(1.0, max(0.0, share - options.lr_flat) / (1 - options.lr_flat))
    return factor * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fallen)))


def _whole(steps: float) -> int:
    return max(1, int(steps))

"""What a sweep's trials say, from sweeps made up so that the answer is known."""
import io
import json
import random

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.trials import analyse, draw_trials, trial_figures, trials_table

SPACE = {"train.lr": [0.001, 0.002, 0.004], "loss.loss_bbox": {"low": 1.0, "high": 10.0, "log": True}}
PRESENT = {"train.lr": 0.002, "loss.loss_bbox": 5.0}


def row(number, values, curve, status="finished", present=PRESENT, hours=0.5, **more):
    """A trial; curve: AP at validation 1, 2, ..."""
    points = [{"validation": at, "step": 100 * at, "AP": ap, "AP50": ap} for at, ap in enumerate(curve, 1)]
    return {
        "number": number, "values": values, "changes": {k: v for k, v in values.items() if v != present[k]},
        "status": status, "AP": max(curve, default=None), "AP50": max(curve, default=None), "curve": points,
        "steps": 100 * len(curve), "images_per_second": 40.0, "seconds": 90.0, "device_hours": hours, "run_id": "r",
        "error": None, **more,
    }  # fmt: skip


def sweep_of(trials, space=SPACE, present=PRESENT, best=0, validations=4, **more):
    return {"format": 2, "search": "random", "scheduler": "asha", "budget": "90 seconds", "validations": validations,
            "device": "CPU", "min_gain": 0.01, "space": space, "present": present, "trials": trials, "best": best,
            **more}  # fmt: skip


def decided_by_rate(number, stop=lambda n: False, space=SPACE, present=PRESENT):
    """A sweep of so many trials in which train.lr alone decides, and the order at each cut is that at the end."""
    dice, trials = random.Random(3), []
    for n in range(number):
        values = dict(present) if n == 0 else {
            axis: dice.choice(choices) if isinstance(choices, list)
            else 10 ** dice.uniform(np.log10(choices["low"]), np.log10(choices["high"]))
            for axis, choices in space.items()
        }  # fmt: skip
        end = 0.1 + 100 * values["train.lr"] + 0.001 * dice.random()
        stopped = n > 0 and stop(n)
        curve = [round(end * at / 4, 6) for at in range(1, 2 if stopped else 5)]
        trials.append(row(n, values, curve, "stopped" if stopped else "finished", present))
    best = max((t for t in trials if t["status"] == "finished"), key=lambda t: t["AP"])
    return sweep_of(trials, space, present, best["number"])


def ends(*pairs, **more):
    """Finished trials of two validations: AP at the cut and at the end."""
    trials = [row(n, {**PRESENT, "loss.loss_bbox": 5.0 - 0.5 * n}, pair) for n, pair in enumerate(pairs)]
    return sweep_of(trials, validations=2, **more)


def said(found):
    result = analyse(found)
    json.dumps(result, allow_nan=False)
    return result, " ".join(result["words"])


def test_the_setting_that_decides_is_the_important_one():
    result, text = said(decided_by_rate(16))
    importance = result["importance"]
    assert importance["validation"] == 4 and importance["trials"] == 16
    assert importance["shares"]["train.lr"] > 0.7 and sum(importance["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert "the last that all 16 measured trials reached): train.lr" in text
    assert "These shares are a hint: 16 trials for 2 settings" in text
    assert "a hint" not in said(decided_by_rate(20))[1]
    assert analyse(decided_by_rate(16)) == analyse(decided_by_rate(16))


def test_the_picture_of_a_cut_is_of_the_one_the_scheduler_makes_first():
    found = decided_by_rate(16) | {"grace_period": 2}
    assert "after 2 of 4" in trial_figures(found, analyse(found))["ranking"][1]
    del found["grace_period"]
    assert "after 1 of 4" in trial_figures(found, analyse(found))["ranking"][1]


def test_a_logarithmic_range_can_be_the_important_one():
    dice = random.Random(0)
    values = [PRESENT] + [{"train.lr": dice.choice(SPACE["train.lr"]), "loss.loss_bbox": 10 ** dice.random()}
                          for _ in range(19)]  # fmt: skip
    found = sweep_of([row(n, v, [0.1 * np.log10(v["loss.loss_bbox"])], "finished") for n, v in enumerate(values)])
    assert said(found)[0]["importance"]["shares"]["loss.loss_bbox"] > 0.8


def test_trials_are_compared_where_all_of_them_were_measured():
    found = decided_by_rate(12, stop=lambda n: n % 2)
    found["trials"].append(row(12, PRESENT, [], "failed", error="It broke."))
    result, text = said(found)
    assert result["importance"]["validation"] == 1 and result["importance"]["trials"] == 12
    assert result["importance"]["shares"]["train.lr"] > 0.7
    assert "AP after 1 of 4 validations, the last that all 12" in text
    assert "6 finished, 6 stopped early, 1 failed" in text


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (decided_by_rate(3), "it takes at least 4 trials that were measured, and there are 3"),
        (ends(*[(0.1, 0.2)] * 5), "all trials have the same AP"),
        (ends((0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5)), "no other setting was varied"),
    ],
)
def test_where_importance_cannot_be_said_there_is_a_reason(found, sentence, tmp_path):
    result, text = said(found)
    assert set(result["importance"]["shares"].values()) == {None}
    assert sentence in text and sentence in result["importance"]["reasons"].values()
    assert "importance.png" not in [path.name for path in draw_trials(found, tmp_path)]


def test_a_setting_with_one_value_has_no_importance():
    space, present = {**SPACE, "train.batch_size": [8]}, {**PRESENT, "train.batch_size": 8}
    result, text = said(decided_by_rate(8, space=space, present=present))
    assert result["importance"]["shares"]["train.batch_size"] is None
    assert result["importance"]["shares"]["train.lr"] > 0.5
    assert "Not known of train.batch_size: all trials have the same value." in text


def test_a_cut_that_predicts_the_end():
    result, text = said(ends((0.1, 0.4), (0.2, 0.5), (0.3, 0.6), (0.15, 0.45)))
    cut = {"validation": 1, "trials": 4, "tau": 1.0, "rho": 1.0, "best_kept": True, "regret": 0.0}
    assert result["ranking"] == {"cuts": [cut], "reason": None}
    assert "with Kendall's tau 1.00 and Spearman's rho 1.00, over 4 finished trials; the better half held the" in text
    assert "So few finished trials make this a hint." in text
    assert "A stopped trial has no end" not in text


def test_a_cut_that_misleads():
    result, text = said(ends((0.1, 0.62), (0.2, 0.5), (0.3, 0.4)))
    cut = {"validation": 1, "trials": 3, "tau": -1.0, "rho": -1.0, "best_kept": False, "regret": 0.12}
    assert result["ranking"]["cuts"] == [cut]
    assert "keeping only the better half would have cost 0.120 AP." in text


def test_stopped_trials_do_not_count_for_the_ranking():
    found = ends((0.1, 0.4), (0.2, 0.5), (0.3, 0.6))
    found["trials"].append(row(3, PRESENT | {"train.lr": 0.004}, [0.9], "stopped"))
    result, text = said(found)
    assert result["ranking"]["cuts"][0]["trials"] == 3 and result["ranking"]["cuts"][0]["tau"] == 1
    assert "A stopped trial has no end, so this is from the finished trials alone" in text


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (ends((0.1, 0.2), (0.2, 0.3)), "it takes at least 3 finished trials, and there are 2"),
        (sweep_of([row(n, PRESENT, [0.1 * n]) for n in range(5)], validations=1), "measured once, at its end"),
        (ends((0.1, 0.2), (0.1, 0.3), (0.1, 0.4)), "all 3 finished trials have the same AP: no ranking"),
    ],
)
def test_where_the_cut_cannot_be_judged_there_is_a_reason(found, sentence):
    assert sentence in said(found)[1]


def test_what_was_gained_and_its_price():
    found = ends((0.1, 0.40), (0.2, 0.42), (0.3, 0.45), best=2)
    found["trials"].append(row(3, PRESENT, [], "failed", hours=0.5, error="It broke."))
    result, text = said(found)
    assert result["hours"] == {"unit": "CPU-hours", "total": 2.0, "per_trial": 0.5, "AP_points_gained": 5.0,
                               "per_AP_point": 0.4}  # fmt: skip
    assert "2.00 CPU-hours in all, 0.500 per trial, 0.400 per AP point gained (5.0 points; 1 point is 0.01 AP)" in text
    assert "Trial 2 is best, with AP 0.450 on val: loss.loss_bbox=4." in text


def test_nothing_gained():
    result, text = said(ends((0.1, 0.40), (0.2, 0.405), (0.3, 0.3)))
    assert result["hours"]["AP_points_gained"] == 0 and result["hours"]["per_AP_point"] is None
    assert "nothing was gained, so there is no figure per AP point" in text
    assert "The present settings stay, with AP 0.400 on val: no trial gained 0.01 AP." in text
    assert "The best other one, trial 1, has 0.405." in text


def test_present_settings_that_failed_or_were_stopped_are_no_fair_measure():
    found = ends((0.1, 0.40), (0.2, 0.45), best=1)
    found["trials"][0] = row(0, PRESENT, [0.1], "stopped")
    assert "They were stopped early, so a part of the gain is the longer training." in said(found)[1]
    found["trials"][0] = row(0, PRESENT, [], "failed", error="It broke.")
    result, text = said(found)
    assert result["hours"]["AP_points_gained"] is None and "what it gains is not known" in text


def test_all_failed_but_one(tmp_path):
    broken = [row(n, PRESENT | {"train.lr": 0.004}, [], "failed", hours=None, error="It broke.") for n in (1, 2, 3)]
    found = sweep_of([row(0, PRESENT, [0.1, 0.2, 0.3, 0.4]), *broken])
    result, text = said(found)
    assert result["hours"]["total"] == 0.5
    assert "1 finished, 3 failed" in text and "fewer than 2 trials can be compared" in text
    assert draw_trials(found, tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_the_table_has_the_best_first_and_failed_ones_last():
    found = decided_by_rate(6, stop=lambda n: n == 4)
    found["trials"][2] |= {"status": "failed", "error": "Its worker was ended [for its memory].", "AP": None}
    found["trials"][3]["changes"]["loss.losses"] = ["labels", "boxes"]
    console = Console(file=io.StringIO(), width=220)
    console.print(trials_table(found))
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("│")]
    finished = sorted((t for t in found["trials"] if t["AP"] is not None), key=lambda t: -t["AP"])
    assert [int(line.split("│")[1]) for line in lines] == [t["number"] for t in finished] + [2]
    assert "chosen" in lines[0] and sum("chosen" in line for line in lines) == 1
    assert "failed: Its worker was ended [for its memory]." in lines[-1]
    text = "\n".join(lines)
    assert "present settings" in text and "stopped after 1 of 4" in text and 'losses=["labels", "boxes"]' in text


def assert_drawn(paths):
    for path in paths:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert pixels.shape[1] >= 800 and 0.005 < (pixels < 200).mean() < 0.5, path.name


ODD = {
    "model.backbone_frozen_stages_of_the_encoder": [None, "a rather long name of a choice $x_1$", True, 1],
    "train.augment.scales": [[0.5, 1.0], [1.0]],
    "train.weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
    "train.clip": {"low": 0.1, "high": 2.0, "log": False},
    "train.lr": {"low": 1e-4, "high": 4e-3, "log": True},
}
ODD_NOW = {
    "model.backbone_frozen_stages_of_the_encoder": False,
    "train.augment.scales": [0.8],
    "train.weight_decay": 0.0,
    "train.clip": None,
    "train.lr": 8e-3,
}


@pytest.mark.parametrize("number", [5, 60])
def test_pictures_of_settings_of_every_kind(number, tmp_path):
    found = decided_by_rate(number, lambda n: n % 3 == 0, ODD, ODD_NOW)  # the present values are in none of the axes
    result, _ = said(found)
    shares = result["importance"]["shares"]
    assert max(shares, key=shares.get) == "train.lr" or number == 5
    paths = draw_trials(found, tmp_path)
    assert [path.name for path in paths] == ["importance.png", "ranking.png", "slices.png", "parallel.png"]
    assert_drawn(paths)


def test_pictures_of_few_trials(tmp_path):
    paths = draw_trials(decided_by_rate(3), tmp_path)
    assert [path.name for path in paths] == ["ranking.png", "slices.png", "parallel.png"]
    assert_drawn(paths)


def test_one_axis_needs_no_parallel_coordinates(tmp_path):
    found = ends((0.1, 0.2), (0.2, 0.3), (0.3, 0.4))
    assert [path.name for path in draw_trials(found, tmp_path)] == ["ranking.png", "slices.png"]
    assert "There are no parallel coordinates: loss.loss_bbox alone was varied." in said(found)[1]

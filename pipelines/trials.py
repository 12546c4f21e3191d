"""What the trials of a sweep say: which settings mattered, how good the early cut was, and what it cost.

All of it is worked out from the content of trials.json, which `pipelines.sweep` leaves.
"""
from __future__ import annotations

import json
import math
import random
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from pipelines.charts import ACCENT, INK, LINES, SOFT, new_figure, plain, style

FEWEST_TO_RANK, FEWEST_TO_WEIGH = 3, 4  # trials
ENOUGH = 10  # trials per setting, below which an importance is a hint
PRESENT, PALE = LINES[1], "#c6d3d0"
BESIDE = -0.15  # where a value is drawn that is not in the range of an axis
BROAD = 5.6  # inches; a wider picture gets a row of the page to itself
SEARCHES = {"random": "at random", "grid": "over a grid", "optuna": "by Optuna"}
SCHEDULERS = {"asha": "; ASHA stops the weaker ones early", "median": "; those below the median are stopped early"}

Trial = dict[str, Any]


def analyse(found: dict[str, Any]) -> dict[str, Any]:
    """What the content of a trials.json says, in figures and in sentences; nothing in it is NaN.

    Returns {"importance": {"validation": the last one that all trials reached, or None, "trials": how many count,
    "shares": {setting: its share of what all explain, or None}, "reasons": {setting: why there is none}},
    "ranking": {"cuts": [{"validation", "trials", "tau", "rho": None where AP is the same in all, "best_kept": whether
    the trial best at the end was in the better half at the cut, "regret": AP lost by keeping only that half}],
    "reason": why there are no cuts, or None}, "hours": {"unit", "total", "per_trial": None without trials,
    "AP_points_gained": 100 times the AP over the present settings, None where they have none, "per_AP_point": None
    where nothing was gained}, "words": sentences}. The validation of a cut counts from 1.
    """
    importance, ranking, hours = _importance(found), _ranking(found), _hours(found)
    words = [
        _how_words(found),
        _outcome_words(found),
        _hours_words(found, hours),
        *_importance_words(found, importance),
        *_ranking_words(found, ranking),
        *_missing_words(found),
    ]
    return {"importance": importance, "ranking": ranking, "hours": hours, "words": words}


def trial_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The trials, best AP first and failed ones last: {"number", "changes" and "status" in words, "AP", "AP50",
    "seconds", "hours": None where not known, "chosen"}."""
    order = sorted(found["trials"], key=lambda t: (t["status"] == "failed", t["AP"] is None, -(t["AP"] or 0.0)))
    return [
        {
            "number": trial["number"],
            "changes": _changes_words(trial),
            "AP": trial["AP"],
            "AP50": trial["AP50"],
            "status": _status_words(trial, found),
            "seconds": trial["seconds"],
            "hours": trial["device_hours"],
            "chosen": trial["number"] == found["best"],
        }
        for trial in order
    ]


def trials_table(found: dict[str, Any]) -> Table:
    """The trials, best first, for a terminal; the chosen one in bold."""
    table = Table(title=_how_words(found), title_justify="left")
    for column in ("trial", "changes", "AP", "AP50", "how it ended", "seconds", _unit(found)):
        left = column in ("changes", "how it ended")
        table.add_column(column, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
    for row in trial_rows(found):
        cells = (
            str(row["number"]), row["changes"], _ap(row["AP"]), _ap(row["AP50"]), row["status"],
            "" if row["seconds"] is None else f"{row['seconds']:.0f}",
            "" if row["hours"] is None else significant(row["hours"]),
        )  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells), style="bold" if row["chosen"] else None)  # Text: no markup
    return table


def draw_trials(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write importance.png, ranking.png, slices.png and parallel.png into the folder; returns those there were
    trials enough for. `analyse` says in words why one is missing."""
    paths = []
    for name, (figure, _) in trial_figures(found, analyse(found)).items():
        paths.append(Path(folder) / f"{name}.png")
        figure.savefig(paths[-1], dpi=150, facecolor="white")
    return paths


def trial_figures(found: dict[str, Any], said: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """The matplotlib figures by name, each with what it shows in words; said: of `analyse`."""
    figures = {}
    if any(share is not None for share in said["importance"]["shares"].values()):
        figures["importance"] = _importance_figure(said["importance"]), "Importance of each setting"
    if said["ranking"]["cuts"]:
        cuts = said["ranking"]["cuts"]
        grace = found.get("grace_period", 1)  # where the scheduler looks first
        cut = next((cut for cut in cuts if cut["validation"] >= grace), cuts[-1])
        words = f"AP at the end against AP after {cut['validation']} of {found['validations']} validations"
        figures["ranking"] = _ranking_figure(found, cut), words
    trials, at = _compared(found)
    axes = _varied(found, trials)
    if len(trials) > 1 and axes:
        figures["slices"] = _slices_figure(found, axes, trials, at), "AP against each setting"
    if len(trials) > 1 and len(axes) > 1:
        figures["parallel"] = _parallel_figure(found, axes, trials, at), "Settings and AP of each trial as a line"
    return figures


def _curve(trial: Trial) -> dict[int, float]:
    """AP by validation; there is none where the images have no ground truth."""
    return {point["validation"]: point["AP"] for point in trial["curve"] if point["AP"] is not None}


def _compared(found: dict[str, Any]) -> tuple[list[Trial], int | None]:
    """The trials that did not fail and were measured, and the last validation that all of them reached."""
    trials = [trial for trial in found["trials"] if trial["status"] != "failed" and _curve(trial)]
    reached = set.intersection(*(set(_curve(trial)) for trial in trials)) if trials else set()
    return (trials, max(reached)) if reached else ([], None)


def _standing(found: dict[str, Any]) -> Trial | None:
    """The trial of the present settings."""
    return next((trial for trial in found["trials"] if not trial["changes"]), None)


def _chosen(found: dict[str, Any]) -> Trial | None:
    return next((trial for trial in found["trials"] if trial["number"] == found["best"]), None)


def _key(value: Any) -> Any:
    """Values that are the same setting have the same key: 5 and 5.0 do, 1 and true do not."""
    return float(value) if _is_number(value) else json.dumps(value, sort_keys=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _varied(found: dict[str, Any], trials: list[Trial]) -> list[str]:
    """The settings of which these trials have more than one value."""
    return [axis for axis in found["space"] if len({_key(trial["values"][axis]) for trial in trials}) > 1]


def _choices(space: list[Any], values: Iterable[Any]) -> list[Any]:
    """The choices of an axis and what else was tried (the present value may be another); numbers in their order."""
    by_key = {_key(value): value for value in [*space, *values]}
    choices = list(by_key.values())
    return sorted(choices) if all(_is_number(value) for value in choices) else choices


def _importance(found: dict[str, Any]) -> dict[str, Any]:
    """fANOVA, and not PED-ANOVA, which compares the best tenth with the rest: of few trials that is one or two."""
    trials, at = _compared(found)
    shares: dict[str, float | None] = dict.fromkeys(found["space"])
    result = {"validation": at, "trials": len(trials), "shares": shares, "reasons": {}}
    axes = _varied(found, trials)
    reason = None
    if len(trials) < FEWEST_TO_WEIGH:
        reason = f"it takes at least {FEWEST_TO_WEIGH} trials that were measured, and there are {len(trials)}"
    elif len({_curve(trial)[at] for trial in trials}) == 1:
        reason = "all trials have the same AP"
    elif len(axes) == 1:
        reason = "no other setting was varied"
    for axis in shares:
        if reason or axis not in axes:
            result["reasons"][axis] = reason or "all trials have the same value"
    if reason or not axes:
        return result

    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    # Each setting as its place between 0 and 1: fANOVA weighs a range by its width, so a logarithmic one is measured in
    # logarithms, and choices side by side weigh the same.
    columns = {axis: _scale(found["space"][axis], [trial["values"][axis] for trial in trials])[0] for axis in axes}
    distributions = {axis: optuna.distributions.FloatDistribution(min(0.0, *columns[axis]), 1.0) for axis in axes}
    for number, trial in enumerate(trials):
        params = {axis: columns[axis][number] for axis in axes}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=_curve(trial)[at]))
    found_shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    shares.update({axis: round(float(share), 4) for axis, share in found_shares.items()})
    return result


def _ranking(found: dict[str, Any]) -> dict[str, Any]:
    from scipy.stats import kendalltau, spearmanr

    last = found["validations"]
    ended = [trial for trial in found["trials"] if trial["status"] == "finished" and last in _curve(trial)]
    cuts = []
    for cut in range(1, last):
        trials = [trial for trial in ended if cut in _curve(trial)]
        if len(trials) < FEWEST_TO_RANK:
            continue
        early, late = ([_curve(trial)[at] for trial in trials] for at in (cut, last))
        tau = rho = None
        if len(set(early)) > 1 and len(set(late)) > 1:
            tau, rho = (round(float(f(early, late).statistic), 4) for f in (kendalltau, spearmanr))
        order = sorted(range(len(trials)), key=lambda at: -early[at])
        best_kept = max(late[at] for at in order[: math.ceil(len(trials) / 2)])
        regret = round(max(late) - best_kept, 6)
        cuts.append({"validation": cut, "trials": len(trials), "tau": tau, "rho": rho, "best_kept": regret == 0,
                     "regret": regret})  # fmt: skip
    reason = None
    if last < 2:
        reason = "each trial is measured once, at its end"
    elif not cuts:
        reason = f"it takes at least {FEWEST_TO_RANK} finished trials, and there are {len(ended)}"
    return {"cuts": cuts, "reason": reason}


def _hours(found: dict[str, Any]) -> dict[str, Any]:
    total = sum(trial["device_hours"] or 0.0 for trial in found["trials"])
    standing, chosen = _standing(found), _chosen(found)
    points = None
    if standing and chosen and standing["AP"] is not None and chosen["AP"] is not None:
        points = round(100 * (chosen["AP"] - standing["AP"]), 4)
    return {
        "unit": _unit(found),
        "total": round(total, 6),
        "per_trial": round(total / len(found["trials"]), 6) if found["trials"] else None,
        "AP_points_gained": points,
        "per_AP_point": round(total / points, 6) if points is not None and points > 0 else None,
    }


def _unit(found: dict[str, Any]) -> str:
    return f"{found['device']}-hours"


def _how_words(found: dict[str, Any]) -> str:
    number, statuses = len(found["trials"]), [trial["status"] for trial in found["trials"]]
    ends = ", ".join(
        f"{statuses.count(status)} {words}"
        for status, words in (("finished", "finished"), ("stopped", "stopped early"), ("failed", "failed"))
        if status in statuses
    )
    trials = "1 trial" if number == 1 else f"{number} trials"
    searched = f"searched {SEARCHES.get(found['search'], found['search'])}"
    return f"{trials} of {found['budget']}, {searched}{SCHEDULERS.get(found['scheduler'], '')}: {ends}."


def _outcome_words(found: dict[str, Any]) -> str:
    standing, chosen = _standing(found), _chosen(found)
    if chosen is None or chosen["AP"] is None:
        return "No trial was measured, so none is best."
    if chosen is not standing:
        words = f"Trial {chosen['number']} is best, with AP {_ap(chosen['AP'])} on val: {_changes_words(chosen)}."
        if standing is None or standing["AP"] is None:
            return f"{words} The present settings were not measured, so what it gains is not known."
        words += f" The present settings have {_ap(standing['AP'])}."
        if standing["status"] == "stopped":
            words += " They were stopped early, so a part of the gain is the longer training."
        return words
    words = f"The present settings stay, with AP {_ap(chosen['AP'])} on val: no trial gained {found['min_gain']:g} AP."
    others = [t for t in found["trials"] if t is not chosen and t["status"] != "failed" and t["AP"] is not None]
    nearest = max(others, key=lambda trial: trial["AP"], default=None)
    if nearest is not None:
        words += f" The best other one, trial {nearest['number']}, has {_ap(nearest['AP'])}."
    return words


def _hours_words(found: dict[str, Any], hours: dict[str, Any]) -> str:
    unit = hours["unit"]
    if hours["per_trial"] is None:
        return f"No {unit} were spent."
    words = f"{significant(hours['total'])} {unit} in all, {significant(hours['per_trial'])} per trial"
    points, each = hours["AP_points_gained"], hours["per_AP_point"]
    if points is None:
        return f"{words}; what they gained is not known."
    if each is None:
        return f"{words}; nothing was gained, so there is no figure per AP point."
    return f"{words}, {significant(each)} per AP point gained ({points:.1f} points; 1 point is 0.01 AP)."


def _importance_words(found: dict[str, Any], importance: dict[str, Any]) -> list[str]:
    shares = {axis: share for axis, share in importance["shares"].items() if share is not None}
    reasons = importance["reasons"]
    if not shares:
        return [f"Which settings mattered cannot be said: {reason}." for reason in dict.fromkeys(reasons.values())]
    trials, at = importance["trials"], importance["validation"]
    ranked = ", ".join(f"{axis} {share:.0%}" for axis, share in sorted(shares.items(), key=lambda item: -item[1]))
    words = [
        f"What mattered (fANOVA on AP after {at} of {found['validations']} validations, the last that all {trials} "
        f"measured trials reached): {ranked}."
    ]
    if reasons:
        words.append(f"Not known of {', '.join(reasons)}: all trials have the same value.")
    if trials < ENOUGH * len(shares):
        words.append(
            f"These shares are a hint: {trials} trials for {len(shares)} settings are few; ten for each would be a "
            f"figure to rely on."
        )
    return words


def _ranking_words(found: dict[str, Any], ranking: dict[str, Any]) -> list[str]:
    if ranking["reason"]:
        return [f"How well an early cut predicts the end cannot be said: {ranking['reason']}."]
    words = [_cut_words(cut, found["validations"]) for cut in ranking["cuts"]]
    if ranking["cuts"][0]["tau"] is not None:
        words[0] += " 1 is the same order, 0 none, -1 the reverse."
    if ranking["cuts"][0]["trials"] < ENOUGH:
        words.append("So few finished trials make this a hint.")
    if any(trial["status"] == "stopped" for trial in found["trials"]):
        words.append(
            "A stopped trial has no end, so this is from the finished trials alone: how the stopped ones would have "
            "ended is not known."
        )
    return words


def _cut_words(cut: dict[str, Any], last: int) -> str:
    if cut["tau"] is None:
        return (
            f"After {cut['validation']} of {last} validations or at the end all {cut['trials']} finished trials have "
            f"the same AP: no ranking."
        )
    words = (
        f"The ranking after {cut['validation']} of {last} validations predicts that at the end with Kendall's tau "
        f"{cut['tau']:.2f} and Spearman's rho {cut['rho']:.2f}, over {cut['trials']} finished trials;"
    )
    if cut["best_kept"]:
        return f"{words} the better half held the best."
    return f"{words} keeping only the better half would have cost {_ap(cut['regret'])} AP."


def _missing_words(found: dict[str, Any]) -> list[str]:
    trials, _ = _compared(found)
    if len(trials) < 2:
        return ["There are no pictures of AP and settings: fewer than 2 trials can be compared."]
    axes = _varied(found, trials)
    if not axes:
        return ["There are no pictures of AP and settings: all trials have the same values."]
    if len(axes) == 1:
        return [f"There are no parallel coordinates: {axes[0]} alone was varied."]
    return []


def _status_words(trial: Trial, found: dict[str, Any]) -> str:
    if trial["status"] == "failed":
        return f"failed: {trial['error'] or 'no reason is known'}"
    if trial["status"] == "stopped":
        reached = max((point["validation"] for point in trial["curve"]), default=0)
        words = f"stopped after {reached} of {found['validations']}"
    else:
        words = "finished"
    return f"{words}, chosen" if trial["number"] == found["best"] else words


def _changes_words(trial: Trial) -> str:
    return ", ".join(f"{key}={_value(value)}" for key, value in trial["changes"].items()) or "present settings"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _ap(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def significant(value: float) -> str:
    """Three figures that count, never as a power of ten."""
    if value == 0 or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{min(6, 2 - math.floor(math.log10(value)))}f}"


def _short(text: str, width: int = 16) -> str:
    """A name over as many lines as it needs, broken after a dot, an underscore or where it must."""
    spaced = text.replace(".", ".\u200b ").replace("_", "_\u200b ")
    lines = textwrap.wrap(spaced, width + 4, break_on_hyphens=False)
    return plain("\n".join(line.replace("\u200b ", "").replace("\u200b", "") for line in lines))


def _scale(space: Any, values: list[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Where the values lie along an axis, between 0 and 1 or at BESIDE, and its ticks."""
    if not isinstance(space, dict):
        choices = _choices(space, values)
        keys = [_key(value) for value in choices]
        places = {key: (at + 0.5) / len(keys) for at, key in enumerate(keys)}
        every = math.ceil(len(keys) / 8)
        names = [name if len(name) <= 18 else f"{name[:17]}…" for name in map(_value, choices)]
        ticks = list(zip(places.values(), names, strict=True))[::every]
        return [places[_key(value)] for value in values], ticks
    log = bool(space.get("log"))
    inside = [value for value in values if _is_number(value) and (value > 0 or not log)]
    low, high = min(space["low"], *inside, space["high"]), max(space["low"], *inside, space["high"])
    scale = math.log if log else float
    low_at, width = scale(low), (scale(high) - scale(low)) or 1.0
    by_key = {_key(value): (scale(value) - low_at) / width for value in inside}
    ticks = [((scale(value) - low_at) / width, f"{value:.4g}") for value in _tick_values(low, high, log)]
    for value in values:  # the present value may be none, or 0 where the range is logarithmic: beside the range
        if _key(value) not in by_key:
            by_key[_key(value)] = BESIDE
            ticks.append((BESIDE, _value(value)))
    return [by_key[_key(value)] for value in values], ticks


def _tick_values(low: float, high: float, log: bool) -> list[float]:
    """Two to five round values of a range, or its ends."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if log:
        locators = [LogLocator(subs=subs, numticks=99) for subs in ((1, 2, 5), (1, 3), (1,))]
        locators += [LogLocator(base=base, numticks=99) for base in (100, 1000)]
    else:
        locators = [MaxNLocator(4, steps=[1, 2, 5, 10])]
    for locator in locators:
        inside = [float(v) for v in locator.tick_values(low, high) if low * 0.9999 <= v <= high * 1.0001 or low == v]
        if 2 <= len(inside) <= 5:
            return inside
    return [low, high]


def _stands_out(trial: Trial, found: dict[str, Any]) -> bool:
    return trial["number"] == found["best"] or not trial["changes"]


def _spread(trial: Trial, by: float, found: dict[str, Any]) -> float:
    """A little to the side, the same each time, so that trials of one choice do not hide each other."""
    return 0.0 if _stands_out(trial, found) else random.Random(trial["number"]).uniform(-by, by)


def _importance_figure(importance: dict[str, Any]):
    shares = sorted(importance["shares"].items(), key=lambda item: (item[1] is not None, item[1] or 0.0))
    names = [_short(axis, 26) for axis, _ in shares]
    figure = new_figure(BROAD, 0.9 + 0.24 * sum(1 + name.count("\n") for name in names) + 0.1 * len(names))
    axes = figure.subplots()
    axes.barh(range(len(shares)), [share or 0.0 for _, share in shares], color=ACCENT, height=0.62)
    for at, (_, share) in enumerate(shares):
        text, colour = ("one value only", SOFT) if share is None else (f"{share:.0%}", INK)
        axes.text((share or 0.0) + 0.012, at, text, va="center", color=colour, fontsize=9)
    axes.set_yticks(range(len(shares)), names)
    style(axes, "share of what the settings explain", "")
    axes.grid(visible=False)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axes.tick_params(axis="y", length=0)
    return figure


def _ranking_figure(found: dict[str, Any], cut: dict[str, Any]):
    """AP at the end over AP at the cut. Stopped trials, which have no end, are ticks below."""
    last, at = found["validations"], cut["validation"]
    ended, stopped = [], []
    for trial in found["trials"]:
        curve = _curve(trial)
        if trial["status"] == "finished" and at in curve and last in curve:
            ended.append((curve[at], curve[last], trial))
        elif trial["status"] == "stopped" and at in curve:
            stopped.append(curve[at])
    ended.sort(key=lambda point: -point[0])
    figure = new_figure(BROAD, 4.2)
    axes = figure.subplots()
    others = [point for point in ended if not _stands_out(point[2], found)]
    axes.plot([p[0] for p in others], [p[1] for p in others], "o", color=ACCENT, alpha=0.75, markersize=6,
              label="finished trial")  # fmt: skip
    for early, late, trial in ended:
        _mark(axes, early, late, trial, found)
    if stopped:
        axes.plot(stopped, [0.012] * len(stopped), "|", color=SOFT, markersize=10, label="stopped, no end",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    half = math.ceil(len(ended) / 2)
    border = (ended[half - 1][0] + ended[half][0]) / 2
    axes.axvline(border, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("better half →", (border, 1), xycoords=("data", "axes fraction"), xytext=(4, -2),
                  textcoords="offset points", va="top", color=SOFT, fontsize=8.5)  # fmt: skip
    style(axes, f"AP after {at} of {last} validations", "AP at the end")
    axes.margins(x=0.08, y=0.12)
    if cut["tau"] is not None:
        figure.suptitle(
            f"Kendall's tau {cut['tau']:.2f}, Spearman's rho {cut['rho']:.2f}, {cut['trials']} finished trials",
            fontsize=10, color=INK, x=0.02, ha="left",
        )  # fmt: skip
    _legend(figure, axes)
    return figure


def _mark(axes, x: float, y: float, trial: Trial, found: dict[str, Any]) -> None:
    """The chosen trial and the present settings stand out."""
    if trial["number"] == found["best"]:
        axes.plot(x, y, "o", color=ACCENT, markeredgecolor=INK, markeredgewidth=1.8, markersize=9, zorder=4,
                  label=f"chosen, trial {trial['number']}")  # fmt: skip
    if not trial["changes"]:
        axes.plot(x, y, "D", color=PRESENT, markersize=6, zorder=5, label="present settings")


def _legend(figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5,
                  handletextpad=0.4, columnspacing=1.2)  # fmt: skip


def _slices_figure(found: dict[str, Any], settings: list[str], trials: list[Trial], at: int):
    """AP over each setting, all at the same validation; a bar is the mean of a choice's trials."""
    from matplotlib.lines import Line2D

    columns = min(3, len(settings))
    rows = math.ceil(len(settings) / columns)
    figure = new_figure(max(BROAD, 2.9 * columns), 2.3 * rows + 0.5)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    heights = [_curve(trial)[at] for trial in trials]
    for axes, setting in zip(grid.flat, settings, strict=False):
        space = found["space"][setting]
        choices = not isinstance(space, dict)
        places, ticks = _scale(space, [trial["values"][setting] for trial in trials])
        step = 1 / len(_choices(space, [trial["values"][setting] for trial in trials])) if choices else 0.0
        if choices:
            for place in sorted(set(places)):
                here = [height for where, height in zip(places, heights, strict=True) if where == place]
                axes.hlines(sum(here) / len(here), place - 0.36 * step, place + 0.36 * step, color=SOFT, linewidth=1.5)
        for trial, place, height in zip(trials, places, heights, strict=True):
            x = place + _spread(trial, 0.16 * step, found)
            if not _stands_out(trial, found):
                face = ACCENT if trial["status"] == "finished" else "white"
                axes.plot(x, height, "o", color=ACCENT, markerfacecolor=face, markersize=5, alpha=0.8)
            _mark(axes, x, height, trial, found)
        style(axes, _short(setting, 26), "")
        axes.set_xlim(min(0.0, *places) - 0.05, 1.05)
        crowded = sum(len(label) + 2 for _, label in ticks) > 34
        axes.set_xticks([place for place, _ in ticks], [plain(label) for _, label in ticks],
                        rotation=35 if crowded else 0, ha="right" if crowded else "center",
                        rotation_mode="anchor" if crowded else None)  # fmt: skip
        axes.margins(y=0.1)
    for axes in list(grid.flat)[len(settings) :]:
        axes.set_visible(False)
    figure.supylabel(f"AP after {at} of {found['validations']} validations", fontsize=10, color=INK)
    marks = {"finished": dict(markerfacecolor=ACCENT), "stopped early": dict(markerfacecolor="white")}
    if not any(trial["status"] == "stopped" for trial in trials):
        del marks["stopped early"]
    handles = [Line2D([], [], linestyle="", marker="o", color=ACCENT, markersize=5, label=label, **look)
               for label, look in marks.items()]  # fmt: skip
    known = grid.flat[0].get_legend_handles_labels()[0]
    if any(not isinstance(found["space"][setting], dict) for setting in settings):
        known.append(Line2D([], [], color=SOFT, linewidth=1.5, label="mean of a choice"))
    figure.legend(handles=[*handles, *known], loc="outside lower center", ncols=5, frameon=False, fontsize=8.5,
                  handletextpad=0.4, columnspacing=1.2)  # fmt: skip
    return figure


def _parallel_figure(found: dict[str, Any], settings: list[str], trials: list[Trial], at: int):
    """A line per trial through its settings to its AP, the better the darker."""
    from matplotlib import patheffects
    from matplotlib.colors import LinearSegmentedColormap

    heights = [_curve(trial)[at] for trial in trials]
    low, high = min(heights), max(heights)
    ap_space = {"low": low, "high": high}
    scales = [_scale(found["space"][setting], [trial["values"][setting] for trial in trials]) for setting in settings]
    scales.append(_scale(ap_space, heights))
    steps = [0.0 if isinstance(found["space"][s], dict) else 0.1 / len(scale[1])
             for s, scale in zip(settings, scales, strict=False)] + [0.0]  # fmt: skip
    colours = LinearSegmentedColormap.from_list("trials", [PALE, ACCENT])
    names = [_short(setting, 14) for setting in settings] + ["AP"]
    lines = max(1 + name.count("\n") for name in names)
    figure = new_figure(max(BROAD, 1.25 * len(scales) + 0.6), 3.6 + 0.16 * lines)
    axes = figure.subplots()
    for rank, number in enumerate(sorted(range(len(trials)), key=lambda n: heights[n])):
        trial = trials[number]
        ys = [scale[0][number] + _spread(trial, step, found) for scale, step in zip(scales, steps, strict=True)]
        share = (heights[number] - low) / (high - low) if high > low else 1.0
        look = dict(color=colours(share), linewidth=1.2 + share, zorder=2 + rank / len(trials))
        if trial["number"] == found["best"]:
            look = dict(color=INK, linewidth=2.6, zorder=4, label=f"chosen, trial {trial['number']}")
        if not trial["changes"]:
            look = look | dict(color=PRESENT, linestyle=(0, (4, 2)), linewidth=2.2, zorder=5)
            look["label"] = f"present settings{', chosen' if trial['number'] == found['best'] else ''}"
        axes.plot(range(len(scales)), ys, solid_joinstyle="round", **look)
    halo = [patheffects.withStroke(linewidth=3, foreground="white")]
    for x, (_, ticks) in enumerate(scales):
        axes.axvline(x, color=INK if x == len(settings) else SOFT, linewidth=1, zorder=1)
        for y, label in ticks:
            axes.text(x + 0.05, y, plain(label), va="center", fontsize=8.5, color=INK, zorder=6, path_effects=halo)
            axes.plot(x, y, "_", color=INK, markersize=6, zorder=6)
    axes.set_xticks(range(len(scales)), names, fontsize=9, color=INK)
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlim(-0.15, len(settings) + 0.55)
    axes.set_ylim(min(0.0, *(y for places, _ in scales for y in places)) - 0.06, 1.06)
    if axes.get_legend_handles_labels()[0]:
        _legend(figure, axes)
    axes.set_xlabel(f"AP after {at} of {found['validations']} validations: the darker a line, the better",
                    color=SOFT, fontsize=9)  # fmt: skip
    return figure

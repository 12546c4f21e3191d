"""Whether a batch of detections looks like the one before it: scores, classes, detections and rejects per image."""
from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.spatial.distance import jensenshannon
from scipy.stats import chi2_contingency, ttest_ind_from_stats

FAR, SURE = 0.1, 0.001  # a distance worth saying, and how unlikely it must be by chance
MORE = 1.5  # times as many detections in an image


def drift(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any] | None:
    """Two runs' counts (pipelines/plan.py, `counts`) -> how far they are apart.

    Returns {"scores", "classes": Jensen-Shannon distance (Lin 1991; base 2: 0 the same, 1 nothing in common) of the
    scores' histogram and of the classes' shares, None where a run found nothing; "detections_per_image", "rejected":
    [before, now], None for a run without such images; "words": a sentence for each of them that changed by more than
    chance}. None where the counts are of an older version, without "squares".

    What chance does goes by images, since the detections of one are alike: they are taken for copies of one another,
    so that chi-square is divided by the design effect sum n_i^2 / sum n_i of both runs together (Kish 1965).
    """
    if "squares" not in now or "squares" not in before:
        return None
    both, words = (before, now), []
    found = [sum(run["detections"].values()) for run in both]
    effect = max(1, sum(run["squares"]["detections"] for run in both) / max(1, sum(found)))
    scores = _apart([run["scores"] for run in both], effect)
    if scores and scores[1]:
        words.append(f"Scores are spread otherwise than before: mean {_mean(before):.2f}, now {_mean(now):.2f}.")
    names = sorted(before["detections"].keys() | now["detections"].keys())
    mixes = [np.array([run["detections"].get(name, 0) for name in names]) for run in both]
    classes = _apart(mixes, effect)
    if classes and classes[1]:
        shares = [mix / mix.sum() for mix in mixes]
        most = int(np.abs(shares[1] - shares[0]).argmax())
        words.append(
            f"Classes are mixed otherwise than before: {names[most]} was {shares[0][most]:.0%} of the detections, now "
            f"{shares[1][most]:.0%}."
        )
    each = [number / run["ok"] if run["ok"] else None for number, run in zip(found, both, strict=True)]
    if None not in each and max(each) > MORE * min(each) and _other_means(both, each):
        words.append(f"An image has {each[1]:.1f} detections, before {each[0]:.1f}.")
    bad = [1 - run["ok"] / run["images"] if run["images"] else None for run in both]
    table = [[run["images"] - run["ok"], run["ok"]] for run in both]
    if None not in bad and abs(bad[1] - bad[0]) > 0.01 and _unlikely(table):
        words.append(f"{bad[1]:.1%} of the images were rejected, before {bad[0]:.1%}.")
    return {
        "scores": scores and scores[0],
        "classes": classes and classes[0],
        "detections_per_image": [number if number is None else round(number, 3) for number in each],
        "rejected": [share if share is None else round(share, 4) for share in bad],
        "words": words,
    }


def _apart(histograms: list[Any], effect: float) -> tuple[float, bool] | None:
    """(distance, whether it is worth saying) of two histograms of detections; None where one is empty."""
    table = np.asarray(histograms, float)
    if not table.sum(1).all():
        return None
    distance = float(jensenshannon(*table, base=2))
    return round(distance, 4), distance > FAR and _unlikely(table / effect)


def _unlikely(table: Any) -> bool:
    """Whether rows of counts would hardly come from one source (chi-square)."""
    table = np.asarray(table, float)
    table = table[:, table.sum(0) > 0]
    if table.shape[1] < 2 or (table.sum(1) == 0).any():
        return False
    return bool(chi2_contingency(table).pvalue < SURE)


def _other_means(both: tuple[dict[str, Any], ...], means: list[float]) -> bool:
    """Whether images would hardly have so different numbers of detections by chance (t-test).

    The variance is that of both runs together: of few images, where most have none, their own may well be 0.
    """
    if sum(run["ok"] for run in both) < 3:
        return False
    given = []
    for run, mean in zip(both, means, strict=True):
        left = max(0.0, run["squares"]["detections"] - run["ok"] * mean**2)
        given += [mean, math.sqrt(left / max(1, run["ok"] - 1)), run["ok"]]
    return bool(ttest_ind_from_stats(*given).pvalue < SURE)


def _mean(run: dict[str, Any]) -> float:
    """The mean score, from the histogram."""
    middles = (np.arange(len(run["scores"])) + 0.5) / len(run["scores"])
    return float(np.average(middles, weights=run["scores"]))

"""Whether a batch of detections looks like the one before it: scores, classes, detections and rejects per image."""
from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.distance import jensenshannon
from scipy.stats import chi2_contingency

FAR, SURE = 0.1, 0.001  # a distance worth saying, and how unlikely it must be by chance
MORE = 1.5  # times as many detections in an image


def drift(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Two runs' counts (pipelines/plan.py, `counts`) -> how far they are apart.

    Returns {"scores", "classes": Jensen-Shannon distance (Lin 1991; base 2: 0 the same, 1 nothing in common) of the
    scores' histogram and of the classes' shares, None where a run found nothing; "detections_per_image", "rejected":
    [before, now]; "words": a sentence for each of them that changed by more than chance (chi-square)}.
    """
    words = []
    scores = _apart(before["scores"], now["scores"])
    if scores and scores[1]:
        words.append(f"Scores are spread otherwise than before: mean {_mean(before):.2f}, now {_mean(now):.2f}.")
    names = sorted(before["detections"].keys() | now["detections"].keys())
    mixes = [np.array([run["detections"].get(name, 0) for name in names]) for run in (before, now)]
    classes = _apart(*mixes)
    if classes and classes[1]:
        shares = [mix / mix.sum() for mix in mixes]
        most = int(np.abs(shares[1] - shares[0]).argmax())
        words.append(
            f"Classes are mixed otherwise than before: {names[most]} was {shares[0][most]:.0%} of the detections, now "
            f"{shares[1][most]:.0%}."
        )
    found = [sum(run["detections"].values()) for run in (before, now)]
    each = [number / max(1, run["ok"]) for number, run in zip(found, (before, now), strict=True)]
    if sum(found) and max(each) > MORE * min(each) and _unlikely([found, [before["ok"], now["ok"]]]):
        words.append(f"An image has {each[1]:.1f} detections, before {each[0]:.1f}.")
    bad = [1 - run["ok"] / max(1, run["images"]) for run in (before, now)]
    table = [[run["images"] - run["ok"], run["ok"]] for run in (before, now)]
    if abs(bad[1] - bad[0]) > 0.01 and _unlikely(table):
        words.append(f"{bad[1]:.1%} of the images were rejected, before {bad[0]:.1%}.")
    return {
        "scores": scores and scores[0],
        "classes": classes and classes[0],
        "detections_per_image": [round(number, 3) for number in each],
        "rejected": [round(share, 4) for share in bad],
        "words": words,
    }


def _apart(before: Any, now: Any) -> tuple[float, bool] | None:
    """(distance, whether it is worth saying) of two histograms; None where one is empty."""
    before, now = np.asarray(before, float), np.asarray(now, float)
    if not before.sum() or not now.sum():
        return None
    distance = float(jensenshannon(before, now, base=2))
    return round(distance, 4), distance > FAR and _unlikely([before, now])


def _unlikely(table: Any) -> bool:
    """Whether rows of counts would hardly come from one source."""
    table = np.asarray(table, float)
    table = table[:, table.sum(0) > 0]
    if table.shape[1] < 2 or (table.sum(1) == 0).any():
        return False
    return bool(chi2_contingency(table).pvalue < SURE)


def _mean(run: dict[str, Any]) -> float:
    """The mean score, from the histogram."""
    middles = (np.arange(len(run["scores"])) + 0.5) / len(run["scores"])
    return float(np.average(middles, weights=run["scores"]))

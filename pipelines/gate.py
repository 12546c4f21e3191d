"""The gate: the rules a version must pass to become champion, each with its figure, its limit and a sentence."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.fs import FileType

from pipelines.alike import find_alike
from pipelines.settings import GateSettings
from pipelines.shards import count_rejects, read_split
from pipelines.stage import read_json
from pipelines.storage import filesystem, join, kind

TRAINED_ON = "trained_on.parquet"  # in a checkpoint: the images it was trained on, by digest and thumbnail

BASE_UNKNOWN = b"detr.base_unknown"  # in its metadata: it began from a checkpoint that does not say

Rule = dict[str, Any]


def judge(
    gate: GateSettings,
    evaluation: dict[str, Any] | None,
    candidate: dict[str, Any],
    champion: dict[str, Any] | None,
    comparison: dict[str, Any] | None,
) -> list[Rule]:
    """The rules as [{"rule", "ok", "figure", "limit", "words"}, ...]; the words say what was found.

    evaluation: what `evaluate` returned, with "data": {"seen", "rejected": shares of the images it was measured on;
    "seen" None where it is not known, "base_known": whether it also says so of the checkpoint it began from}; None with
    a candidate that has a problem, which is said alone. candidate: {"version", "problem" (what is wrong with its files,
    or None), "categories", "megabytes", "rolled_back" (why, or None)}. champion: {"version", "problem", "categories"}
    of another version, or None; comparison: `compare_evaluations` of the champion with the candidate, with
    "split_digest" and "seen_by_first", the share of the images that the champion was trained on; None where it could
    not be made (and champion["problem"] or the classes say why).
    """
    rules = [
        _rule(
            "files are those registered", candidate["problem"] is None, candidate["problem"], None,
            candidate["problem"] or "their digests are the same",
        )
    ]  # fmt: skip
    if candidate["problem"] is not None:
        return rules
    seen = _share(
        "was not trained on the images it is measured on", evaluation["data"]["seen"], gate.max_seen,
        "of the images it was measured on, or nearly the same ones, it was trained on", "gate.max_seen",
    )  # fmt: skip
    if not evaluation["data"]["base_known"]:
        seen["words"] += "; on which the checkpoint was that it began from is not known"
    rules += [
        _floor(gate, evaluation),
        _rule(
            "was not rolled back", candidate["rolled_back"] is None, candidate["rolled_back"], None,
            "it never was" if candidate["rolled_back"] is None
            else f"it was rolled back ({candidate['rolled_back']}); delete its tag rolled_back to allow it again",
        ),
        seen,
        _share(
            "data checks passed", evaluation["data"]["rejected"], gate.max_rejected,
            "of the images it was to be measured on were rejected", "gate.max_rejected",
        ),
    ]  # fmt: skip
    if gate.max_megabytes is not None:
        size = candidate["megabytes"]
        rules.append(
            _rule("is small enough", size is not None and size <= gate.max_megabytes, size, gate.max_megabytes,
                  f"its weights have {size} MB, and gate.max_megabytes is {gate.max_megabytes:g}")
        )  # fmt: skip
    if gate.min_images_per_second is not None:
        speed = evaluation.get("images_per_second")
        said = "was not measured" if speed is None else f"is {speed:g} images/s"
        rules.append(
            _rule("is fast enough", speed is not None and speed >= gate.min_images_per_second, speed,
                  gate.min_images_per_second,
                  f"its speed {said}, and gate.min_images_per_second is {gate.min_images_per_second:g}")
        )  # fmt: skip
    if champion is not None:
        rules += _beside(gate, evaluation, candidate, champion, comparison)
    return rules


def seen_in_training(checkpoint: Path, dataset_folder: Path, split: str) -> tuple[float | None, bool]:
    """Which share of a split's images the checkpoint was trained on, or on nearly the same; None if it does not say.

    And whether that includes what the checkpoint was trained on that it began from, if any.
    """
    path = Path(checkpoint) / TRAINED_ON
    if not path.is_file():
        return None, True
    trained, measured = pq.read_table(path), read_split(dataset_folder, split, ["sha256", "thumbnail"])
    whole = BASE_UNKNOWN not in (trained.schema.metadata or {})
    if not measured.num_rows:
        return 0.0, whole
    same = pc.is_in(measured["sha256"], value_set=trained["sha256"].combine_chunks()).to_numpy()
    pictures, others = (
        np.frombuffer(b"".join(table["thumbnail"].to_pylist()), np.uint8).reshape(table.num_rows, -1)
        for table in (measured, trained)
    )
    alike = np.array([len(near) > 0 for near in find_alike(pictures, others)], bool)
    return float((same | alike).mean()), whole


def rejected_share(dataset_folder: Path, split: str) -> float:
    """Which share of a split's images ingest rejected."""
    rejected = sum(
        row["count"] for row in count_rejects(dataset_folder) if (row["split"], row["kind"]) == (split, "image")
    )
    images = read_json(Path(dataset_folder) / "dataset.json")["splits"][split]["images"]
    return rejected / max(1, rejected + images)


def write_trained_on(dataset_folder: Path, checkpoint: Path, base: str | None = None) -> None:
    """Leave in a checkpoint which images it was trained on; base: the checkpoint it began from, whose images count."""
    tables = [read_split(dataset_folder, "train", ["sha256", "thumbnail"])]
    whole = True
    if base is not None:
        place = join(base, TRAINED_ON)
        whole = kind(place) == FileType.File
        if whole:
            fs, path = filesystem(place)
            tables.append(pq.read_table(path, filesystem=fs))
            whole = BASE_UNKNOWN not in (tables[-1].schema.metadata or {})
    table = pa.concat_tables([table.replace_schema_metadata() for table in tables])
    table = table if whole else table.replace_schema_metadata({BASE_UNKNOWN: b""})
    pq.write_table(table, Path(checkpoint) / TRAINED_ON)


def _rule(rule: str, ok: bool, figure: Any, limit: Any, words: str) -> Rule:
    return {"rule": rule, "ok": bool(ok), "figure": figure, "limit": limit, "words": words}


def _floor(gate: GateSettings, evaluation: dict[str, Any]) -> Rule:
    ap = evaluation["AP"]
    known = ap is not None and math.isfinite(ap)
    said = f"AP {ap:.4f}" if known else "AP undefined (nothing to find)"
    ok = known and ap >= gate.min_ap
    return _rule(
        "AP reaches the floor", ok, round(ap, 6) if known else None, gate.min_ap,
        f"{said} is {'at least' if ok else 'below' if known else 'not'} gate.min_ap {gate.min_ap}",
    )  # fmt: skip


def _share(rule: str, share: float | None, limit: float, what: str, setting: str) -> Rule:
    if share is None:
        return _rule(rule, True, "not known", limit, "it is not known on which images it was trained")
    share = round(share, 6)
    return _rule(rule, share <= limit, share, limit, f"{share:.1%} {what} ({setting} allows {limit:.1%})")


def _beside(gate, evaluation, candidate, champion, comparison) -> list[Rule]:
    """What can be said only beside a champion that is another version."""
    other = f"champion version {champion['version']}"
    rules = [
        _rule("the champion is there", champion["problem"] is None, champion["problem"], None,
              champion["problem"] or f"{other} is there")
    ]  # fmt: skip
    if champion["problem"] is not None:
        return rules
    missing = missing_classes(champion["categories"], candidate["categories"])
    rules.append(
        _rule("has the champion's classes", not missing, ", ".join(missing[:10]) or None, None,
              f"it has all classes of {other}" if not missing
              else f"of the classes of {other} it lacks {', '.join(missing[:10])} (the same id and name)")
    )  # fmt: skip
    if comparison is None:
        return rules
    same = comparison["split_digest"] == evaluation["split_digest"]
    rules.append(
        _rule("measured on the same images", same, evaluation["split_digest"][:12], comparison["split_digest"][:12],
              f"both were measured on the same {comparison['images']} images" if same
              else f"{other} was measured on other images than it")
    )  # fmt: skip
    if not same:  # then the numbers cannot be compared
        return rules
    rules += [_above(gate, comparison, other), _no_class_lost(gate, comparison)]
    return rules


def _above(gate: GateSettings, comparison: dict[str, Any], other: str) -> Rule:
    rule, ap = "AP is above the champion's", comparison["AP"]
    if ap["difference"] is None:
        return _rule(rule, False, None, gate.margin, f"it cannot be compared with {other}: there is nothing to find")
    if ap["low"] is None and comparison["resamples"]:
        return _rule(
            rule, False, round(ap["difference"], 6), gate.margin,
            f"its AP {ap['second']:.4f} is {ap['difference']:+.4f} beside the {ap['first']:.4f} of {other}, and there "
            "are too few images with objects to be sure (evaluate.resamples=0 lets the difference itself decide)",
        )  # fmt: skip
    low = ap["low"] if ap["low"] is not None else ap["difference"]
    sure = "" if ap["low"] is None else f", {comparison['confidence']:.0%} sure {ap['low']:+.4f} to {ap['high']:+.4f}"
    ok, seen = low > gate.margin, comparison["seen_by_first"] or 0.0
    return _rule(
        rule, ok, round(low, 6), gate.margin,
        f"its AP {ap['second']:.4f} is {ap['difference']:+.4f} beside the {ap['first']:.4f} of {other}{sure}; "
        f"the low end {'is' if ok else 'must be'} above gate.margin {gate.margin:g}"
        + (f" (which was trained on {seen:.1%} of these images)" if seen > gate.max_seen else ""),
    )  # fmt: skip


def _no_class_lost(gate: GateSettings, comparison: dict[str, Any]) -> Rule:
    known = [one for one in comparison["per_class"] if one["difference"] is not None]

    def surely(one: dict[str, Any]) -> bool:
        return not comparison["resamples"] if one["high"] is None else one["high"] < 0

    lost = [one for one in known if one["difference"] < -gate.max_class_drop and surely(one)]
    said = "; ".join(f"{one['name']!r} fell from AP {one['first']:.3f} to {one['second']:.3f}" for one in lost[:5])
    more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
    return _rule(
        "no class is much worse", not lost, round(min((one["difference"] for one in known), default=0.0), 6),
        -gate.max_class_drop,
        f"{said}{more}, surely, and gate.max_class_drop is {gate.max_class_drop:g}" if lost
        else f"no class surely lost more AP than gate.max_class_drop {gate.max_class_drop:g}",
    )  # fmt: skip


def missing_classes(wanted: list[dict[str, Any]], there: list[dict[str, Any]]) -> list[str]:
    """The names of the wanted categories that are not there with the same id and name."""
    known = {(category["id"], category["name"]) for category in there}
    return [repr(c["name"]) for c in wanted if (c["id"], c["name"]) not in known]

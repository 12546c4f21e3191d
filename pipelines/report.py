"""One page that says how good the model is, shows what it sees and where it errs, and where it came from."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from detr.checkpoint import CheckpointError
from detr.draw import class_colours, picture_grid
from pipelines.charts import (
    ap_figure,
    calibration_figure,
    confusion_figure,
    curves_figure,
    differences_figure,
    errors_figure,
    loss_figure,
    precision_recall_figure,
    svg,
)
from pipelines.compare import in_words, judgement
from pipelines.evaluate import coco_truth, detections_to_coco, f1_at
from pipelines.look import Finding
from pipelines.matching import IOUS, match
from pipelines.pictures import Scenes, jpeg
from pipelines.resample import ENOUGH, TOO_FEW
from pipelines.settings import RunSettings, UserError, flatten
from pipelines.shards import count_rejects, read_split
from pipelines.stage import read_json
from pipelines.trials import BROAD, analyse, significant, trial_figures, trial_rows

TRIALS = 30  # rows of the sweep's table
CLASSES = 20  # as many have a chart of their own and stand in one table; of more, those that matter come first
WEAKEST = 10  # classes
CONFUSIONS, MISSES = 10, 5  # in words
SURE = 0.05  # scores that are wrong by less on average can be read as probabilities

# What to do about each kind of error.
ADVICE = {
    "missed": "Nothing was found where an object is. Show more images of such objects; for small ones a larger "
    "model.image_size, where images are crowded more model.num_queries.",
    "background": "Something was found where nothing is labelled. Look whether it is an object that was not labelled; "
    "if not, add images without objects that look like it.",
    "wrong class": "Found in place, but taken for another class. See that the two are labelled alike everywhere; add "
    "images of the rarer one, or join the two.",
    "poor box": "The right class, but a box that covers it badly (IoU under .50). See that boxes are labelled tightly; "
    "train longer, or with a larger model.image_size.",
    "wrong class and poor box": "Near an object, but neither its class nor its box is right. It seldom pays to work on "
    "it alone.",
    "duplicate": "One object found more than once. It lessens with longer training and with a higher score threshold.",
}


def report(
    title: str,
    dataset_folder: Path,
    train_record: dict[str, Any] | None,
    evaluations: dict[str, Path],
    history: Path | None,
    settings: RunSettings,
    stages: list[dict[str, Any]],
    registry: dict[str, Any] | None,
    predictions: dict[str, Any] | None,
    folder: Path,
    findings: Sequence[Finding] = (),
    sweep: dict[str, Any] | None = None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Write report.html (one file, no script, nothing fetched), validation_grid.png and curves.png.

    evaluations: `evaluate`'s folder of each split; stages: records of `run_stage`, the training's also as
    train_record; registry: what `promote` or `last_verdict` returned; predictions: figures of a batch job, by name;
    findings: what `look_at_data` found; sweep: the content of a sweep's trials.json; checkpoint: the folder of what
    was evaluated, to draw where it looks. What is None, empty or not in an older evaluation is said in words, and
    its picture left out; without a sweep its section is.

    The figures are of the test split where there is one, at the threshold of val; the pictures and errors are of val,
    so that nobody tunes by the test images.

    Returns {"report", "validation_grid", "curves"}: paths, or None for a picture there was nothing for.
    Raises UserError where an evaluation was made on another dataset.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(folder)
    dataset = read_json(Path(dataset_folder) / "dataset.json")
    metrics = {split: read_json(Path(place) / "metrics.json") for split, place in evaluations.items()}
    for split, found in metrics.items():
        if found["dataset_digest"] != dataset["digest"]:
            raise UserError(
                f"The evaluation in {evaluations[split]} was made on dataset {found['dataset_digest']}, "
                f"not on {dataset['digest']} in {dataset_folder}; evaluate again.", 2,
            )  # fmt: skip
    judged = next((split for split in ("test", "val", *metrics) if split in metrics), None)
    shown = next((split for split in ("val", judged) if split in metrics), None)  # test images are not looked at
    point = _point(metrics, judged, dataset_folder, dataset["categories"], evaluations, settings)
    names = [category["name"] for category in dataset["categories"]]
    past = read_json(history) if history is not None else {"steps": [], "validations": []}
    trained = (train_record or {}).get("result") or {}
    comparison = _comparison((registry or {}).get("comparison"), dataset)

    threshold, grids = None, {"worst": [], "best": [], "typical": []}
    attention = {"pictures": [], "words": "No evaluation with images was given."}
    grid_path = curves_path = None
    if shown is not None:
        threshold = _threshold(metrics[shown], settings)
        max_dets = settings.evaluate.max_dets
        scenes = Scenes(dataset_folder, shown, dataset["categories"], evaluations[shown], threshold, max_dets)
        chosen_images = scenes.grids()
        for name, chosen in chosen_images.items():
            rows = scenes.rows([scene["id"] for scene in chosen])
            grids[name] = [
                {"name": row["file_name"], "caption": scene["caption"], "source": jpeg(scenes.draw(row))}
                for row, scene in zip(rows, chosen, strict=True)
            ]
        attention = _attention(scenes, chosen_images, checkpoint)
        drawn = [scenes.draw(row) for row in scenes.rows(scenes.spread())]
        if drawn:
            grid_path = folder / "validation_grid.png"
            picture_grid(drawn).save(grid_path, optimize=True)
    if past["steps"] or past["validations"]:
        curves_path = folder / "curves.png"
        curves_figure(past).savefig(curves_path, dpi=150)

    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")
    text = page.render(
        title=title,
        dataset=dataset,
        colours={name: "#{:02x}{:02x}{:02x}".format(*rgb) for name, rgb in class_colours(names).items()},
        metrics=metrics,
        judged=judged,
        shown=shown,
        verdict=_verdict(metrics, judged, point, registry),
        rules=_rules(registry),
        comparison=comparison,
        tiles=_tiles(metrics, judged, point, dataset, train_record, past),
        loss_curve=svg(loss_figure(past["steps"])) if past["steps"] else None,
        ap_curve=svg(ap_figure(past["validations"])) if past["validations"] else None,
        pr_curve=svg(precision_recall_figure(metrics[judged], point)) if _has_curve(metrics, judged) else None,
        classes=_classes(metrics[judged]) if judged else None,
        errors=_errors(metrics[shown].get("errors")) if shown else None,
        confusion=_confusion(metrics[shown].get("confusion")) if shown else None,
        calibration=_calibration(metrics[judged].get("calibration")) if judged else None,
        sweep=_sweep(sweep) if sweep else None,
        grids=grids,
        attention=attention,
        threshold=threshold,
        rejects=count_rejects(dataset_folder),
        findings=findings,
        stages=_stages(stages, settings.cluster.cost_per_hour),
        registry=registry,
        training=_scalars({key: value for key, value in trained.items() if key not in ("checkpoint", "history")}),
        predictions=_predicted(predictions) if predictions else None,
        settings=yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        otherwise=_otherwise(settings, train_record, checkpoint),
        chain=_chain(dataset, train_record, stages, registry),
        keys=_keys(train_record, stages),
        many=len(names) > CLASSES,
        number=_number,
        significant=significant,
        seconds=_seconds,
    )
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return {
        "report": str(path),
        "validation_grid": str(grid_path) if grid_path else None,
        "curves": str(curves_path) if curves_path else None,
    }


def _attention(scenes: Scenes, grids: dict[str, list[dict[str, Any]]], checkpoint: Path | None) -> dict[str, Any]:
    """Where the model looks in a best, a typical and a worst image, or in words why that is not shown."""
    if checkpoint is None or not (Path(checkpoint) / "model.safetensors").is_file():
        return {"pictures": [], "words": "The checkpoint is not here, so where it looks is not shown."}
    seen, chosen = set(scenes.found["image_id"].tolist()), {}
    for name in ("best", "typical", "worst"):
        ids = [scene["id"] for scene in grids[name]]
        if ids:
            chosen[name] = next((image for image in ids if image in seen), ids[0])
    try:
        pictures = scenes.attention(checkpoint, list(chosen.values()))
    except CheckpointError as error:
        return {"pictures": [], "words": f"The checkpoint cannot be read: {error}."}
    for name, picture in zip(chosen, pictures, strict=True):
        picture["caption"] = f"one of the {name}: {picture['caption']}"
    return {"pictures": pictures, "words": "There is no image to show it in."}


def _threshold(metrics: dict[str, Any], settings: RunSettings) -> float:
    """Above which score a detection is drawn: where F1 is best on these images."""
    best = (metrics["best_f1"] or {}).get("threshold")
    return next(value for value in (best, settings.predict.score_threshold, 0.5) if value is not None)


def _point(
    metrics: dict[str, Any], judged: str | None, dataset_folder: Path, categories: list[dict[str, Any]],
    evaluations: dict[str, Path], settings: RunSettings,
) -> dict[str, Any] | None:  # fmt: skip
    """Precision and recall of the judged split, as of `f1_at`, and the split its threshold was "chosen_on".

    On the test split at the threshold of val, where there is one: its own best would flatter it, and is not what
    `detr predict` applies. None without truth.
    """
    best = metrics[judged]["best_f1"] if judged else None
    chosen = ((metrics.get("val") or {}).get("best_f1") or {}).get("threshold")
    if best is None or judged != "test" or chosen is None:
        return best and {**best, "chosen_on": judged}
    columns = ["image_id", "file_name", "width", "height", "annotations"]
    truth = coco_truth(read_split(Path(dataset_folder), judged, columns), categories)
    table = pq.read_table(Path(evaluations[judged]) / "detections.parquet")
    max_dets = metrics[judged].get("max_dets", settings.evaluate.max_dets)
    matches = match(truth, detections_to_coco(table, categories), max_dets, IOUS[:1])
    return {**f1_at(matches, chosen), "chosen_on": "val"}


def _verdict(
    metrics: dict[str, Any], judged: str | None, point: dict[str, Any] | None, registry: dict[str, Any] | None
) -> dict[str, Any]:
    """The headline, the registry's word on it, and plain sentences."""
    sentences = []
    if judged is None:
        headline = "Not measured"
        sentences.append("No evaluation was given, so nothing is known about its quality.")
    else:
        found = metrics[judged]
        headline = f"AP {_number(found['AP'])}, AP50 {_number(found['AP50'])} on the {judged} split"
        intervals = found.get("intervals") or {}
        if intervals.get("AP"):
            inner = f" (AP50 {_between(intervals['AP50'])})" if intervals.get("AP50") else ""
            sentences.append(
                f"AP {_number(found['AP'])} on the {judged} split, 95 % sure to be "
                f"{_between(intervals['AP'])}{inner}: so far could "
                f"other {found['images']:,} images like these move it."
            )
        elif found.get("resamples") and found["AP"] is not None:
            sentences.append(f"Fewer than {ENOUGH} images of the {judged} split have objects: {TOO_FEW} AP is.")
        if point is None:
            sentences.append(f"The {judged} split has no ground truth to measure against.")
        elif point["threshold"] is None:
            sentences.append(f"It finds nothing at all in the {found['images']} images of the {judged} split.")
        else:
            at = "At its best threshold"
            if point["chosen_on"] != judged:
                at = f"At the threshold chosen on the {point['chosen_on']} split"
            finds = f"nothing in the {found['images']:,} images"
            if point["precision"] is not None:
                finds = (f"{point['recall']:.0%} of the objects in the {found['images']:,} images, and "
                         f"{point['precision']:.0%} of what it finds is right")  # fmt: skip
            sentences.append(f"{at}, a score of {point['threshold']:.2f}, it finds {finds}.")
    if registry is None:
        kind, word, reason = "absent", "No verdict on promotion:", "nothing was registered in this run."
    else:
        champion, said = registry["champion"], registry["reason"]
        now = f"The champion now is version {champion}." if champion else "There is no champion now."
        if registry["promoted"] and champion == registry["version"]:
            kind, word, reason = "yes", "Promoted.", f"{said} Champion: version {champion}."
        elif registry["promoted"]:
            back = registry.get("rolled_back")
            kind, word = "no", "Promoted, but no longer champion."
            reason = f"{f'It was rolled back: {back}. ' if back else ''}{now} The gate had said: {said}"
        else:
            if champion == registry["previous"]:
                now = f"The champion stays version {champion}." if champion else "There is no champion."
            kind, word, reason = "no", "Not promoted.", f"{said} {now}"
    return {"headline": headline, "sentences": sentences, "kind": kind, "word": word, "reason": reason}


def _rules(registry: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The gate's rules, those that were broken first; in a verdict of an older version "words" is None."""

    def show(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    rules = []
    for rule in (registry or {}).get("rules", []):
        words = rule.get("words")
        said = [("found", rule["figure"]), ("asked", rule["limit"])]
        figures = [f"{what} {show(value)}" for what, value in said if value is not None and str(value) != words]
        rules.append({"rule": rule["rule"], "ok": rule["ok"], "words": words, "figures": ", ".join(figures)})
    return sorted(rules, key=lambda rule: rule["ok"])


def _comparison(found: dict[str, Any] | None, dataset: dict[str, Any]) -> dict[str, Any] | None:
    """What `compare_evaluations` found, with a verdict on each row, a sentence on both numbers, and a chart."""
    if found is None:
        return None

    def judge(row: dict[str, Any], name: str) -> dict[str, Any]:
        word = judgement(row, found["resamples"])
        return {**row, "name": name, "kind": {"surely better": "better", "surely worse": "worse"}.get(word, ""),
                "word": word}  # fmt: skip

    numbers = [judge(found[key], key) for key in ("AP", "AP50")]
    classes = [judge(row, row["name"]) for row in found["per_class"]]
    sentences = [f"{in_words(key, found[key], found['resamples'])}." for key in ("AP", "AP50")]
    known = sorted((row for row in classes if row["difference"] is not None), key=lambda row: -abs(row["difference"]))
    sure = [row for row in known if row["low"] is not None]
    better, worse = (sum(row["kind"] == kind for row in sure) for kind in ("better", "worse"))
    chance = round((1 - found["confidence"]) * len(sure))
    if sure:
        by_chance = f"; about {chance} would seem so by chance alone" if chance else ""
        sentences.append(f"Of {len(sure)} classes {better} are surely better and {worse} surely worse{by_chance}.")
    splits = {figures["digest"]: split for split, figures in dataset["splits"].items()}
    charted = sorted(known[:CLASSES], key=lambda row: -row["difference"])
    return {
        "images": found["images"],
        "split": splits.get(found.get("split_digest")),
        "confidence": found["confidence"],
        "sentences": sentences,
        "numbers": numbers,
        "classes": classes,
        "first": charted if len(classes) > CLASSES else classes,
        "chart": svg(differences_figure(charted)) if charted else None,
    }


def _classes(found: dict[str, Any]) -> dict[str, Any]:
    """The rows of the table per class, and the weakest of many; what an older evaluation lacks is no column."""
    rows = found["per_class"]
    known = sorted((row for row in rows if row["AP"] is not None), key=lambda row: row["AP"])
    return {
        "rows": rows,
        "weakest": known[:WEAKEST] if len(rows) > CLASSES else [],
        "sizes": all("APs" in row for row in rows),
        "intervals": bool(found.get("resamples")) or any(row.get("interval") for row in rows),
    }


def _errors(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Kinds of errors, what costs most first, each with what to do about it."""
    if found is None:
        return None
    rows = [
        {"kind": kind, "count": found["counts"][kind], "cost": found["cost"][kind], "advice": ADVICE[kind]}
        for kind in ADVICE
    ]
    rows.sort(key=lambda row: (-(row["cost"] or 0), -row["count"]))
    total = sum(row["count"] for row in rows)
    return {"rows": rows, "total": total, "threshold": found["threshold"],
            "chart": svg(errors_figure(rows)) if total else None}  # fmt: skip


def _confusion(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """What is taken for what: a heat map of few classes, and the commonest confusions in words."""
    if found is None:
        return None
    names, matrix = found["names"], found["matrix"]
    nothing = len(names) - 1
    taken = sorted(
        ((matrix[row][column], row, column) for row in range(nothing) for column in range(nothing) if row != column),
        key=lambda cell: -cell[0],
    )
    words = [
        f"‘{names[row]}’ taken for ‘{names[column]}’ {_times(count)}, of {sum(matrix[row]):,} labelled"
        for count, row, column in taken[:CONFUSIONS]
        if count
    ]
    lost = sorted(range(nothing), key=lambda row: -matrix[row][nothing])[:MISSES]
    unlabelled = found.get("unlabelled", [])  # older evaluations do not have it
    false = sorted(range(len(unlabelled)), key=lambda at: -unlabelled[at])[:MISSES]
    return {
        "threshold": found["threshold"],
        "chart": svg(confusion_figure(found)) if nothing <= CLASSES else None,
        "confused": words,
        "more": sum(1 for count, *_ in taken[CONFUSIONS:] if count),
        "missed": [f"‘{names[row]}’ {matrix[row][nothing]:,} of {sum(matrix[row]):,}" for row in lost
                   if matrix[row][nothing]],
        "false": [f"‘{names[at]}’ {_times(unlabelled[at])}" for at in false if unlabelled[at]],
    }  # fmt: skip


def _calibration(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """How far scores can be read as probabilities, in words and as a chart."""
    if found is None:
        return None
    bins = [b for b in found["bins"] if b["count"]]
    if found["error"] is None or not bins:
        return {"words": "There is no detection with a score to judge.", "chart": None}
    error, total = found["error"], sum(b["count"] for b in bins)
    sureness = sum(b["count"] * (b["score"] - b["precision"]) for b in bins) / total
    if error < SURE:
        means = "they can be read as probabilities"
    elif abs(sureness) < error / 2:
        means = "some are too high and others too low; the chart says which"
    else:
        means = f"they are too {'high' if sureness > 0 else 'low'}, and no probabilities"
    words = f"A score is wrong by {error:.3f} on average (expected calibration error): {means}."
    return {"words": words, "chart": svg(calibration_figure(bins))}


def _tiles(metrics, judged, point, dataset, train_record, past) -> list[dict[str, str]]:
    tiles = []
    if judged is not None:
        found = metrics[judged]
        best, own = point or {}, not point or point["chosen_on"] == judged
        at = "no threshold"
        if best.get("threshold") is not None:
            at = f"at score {best['threshold']:.2f}" + ("" if own else f", chosen on {best['chosen_on']}")
        tiles += [
            {"label": "AP", "value": _number(found["AP"]), "note": f"{judged} split, IoU .50 to .95"},
            {"label": "AP50", "value": _number(found["AP50"]), "note": f"{judged} split, IoU .50"},
            {"label": "Best F1" if own else "F1", "value": _number(best.get("f1")), "note": at},
        ]  # fmt: skip
    train = dataset["splits"].get("train")
    if train:
        tiles.append(
            {"label": "Trained on", "value": f"{train['images']:,}", "note": f"images, {train['boxes']:,} boxes"}
        )
    if train_record:
        steps = past["steps"][-1] if past["steps"] else {}
        note = f"{steps['step']:,} steps" if "step" in steps else "from start to end"
        tiles.append({"label": "Training", "value": _seconds(train_record["seconds"]), "note": note})
    tiles.append({"label": "Classes", "value": str(len(dataset["categories"])), "note": f"in {dataset['name']}"})
    return tiles


def _sweep(found: dict[str, Any]) -> dict[str, Any]:
    said, rows = analyse(found), trial_rows(found)
    figures = trial_figures(found, said).values()
    return {
        "words": said["words"],
        "unit": said["hours"]["unit"],
        "rows": rows[:TRIALS],
        "more": len(rows[TRIALS:]),
        "pictures": [
            {"source": svg(figure), "alt": words, "broad": figure.get_figwidth() > BROAD} for figure, words in figures
        ],
    }


def _stages(stages: list[dict[str, Any]], per_hour: float | None) -> dict[str, Any] | None:
    """Seconds of each stage, and where it is known what an hour costs, its cost."""
    if not stages:
        return None

    def cost(seconds: float) -> str | None:
        return None if per_hour is None else f"{per_hour / 3600 * seconds:,.2f}"

    total = sum(record["seconds"] for record in stages if not record.get("reused"))
    longest = max(record["seconds"] for record in stages) or 1
    return {
        "rows": [
            {
                "stage": record["stage"],
                "seconds": record["seconds"],
                "share": round(100 * record["seconds"] / longest, 1),
                "cost": cost(record["seconds"]),
                "reused": bool(record.get("reused")),
            }
            for record in stages
        ],
        "total": total,
        "cost": cost(total),
        "saved": sum(record["seconds"] for record in stages if record.get("reused")),
    }


def _chain(dataset, train_record, stages, registry) -> list[dict[str, Any]]:
    """From the data to the predictions, a step each: {"what", "which", "digest"}; unknown is None."""
    records = {record["stage"]: record for record in stages}
    steps = [{"what": "dataset", "which": dataset["name"], "digest": dataset["digest"]}]
    for split, figures in dataset["splits"].items():
        which = f"{figures['images']:,} images, from {figures['annotations_file']}"
        steps.append({"what": f"{split} split", "which": which, "digest": figures["digest"]})
    run = ((train_record or {}).get("result") or {}).get("run_id")
    which = f"run {run} in MLflow" if run else "no run in MLflow is known" if train_record else None
    steps.append({"what": "training", "which": which, "digest": train_record and train_record["key"]})

    weights = records.get("register", {}).get("result", {}).get("weights_sha256")
    for record in stages:
        if record["stage"] == "evaluate":
            weights = weights or record.get("inputs", {}).get("weights")
    steps.append({"what": "weights", "which": "sha256 of model.safetensors" if weights else None, "digest": weights})
    for record in stages:
        if record["stage"] == "evaluate" and "split" in record.get("result", {}):
            which = f"of the {record['result']['split']} split, on {record['result']['images']:,} images"
            steps.append({"what": "evaluation", "which": which, "digest": record["key"]})

    predicted = records.get("predict", {})
    inputs = predicted.get("inputs", {})
    name, version = inputs.get("model", (None, None))
    if inputs.get("weights") != weights:
        name = version = None  # the predictions are another model's
    made = records.get("register", {}).get("result", {})
    name, version = made.get("name", name), made.get("version", version) or (registry or {}).get("version")
    which = f"{name or 'registered'} version {version}" if version else None
    if which and registry:
        which += ", champion" if str(registry["champion"]) == str(version) else ", not champion"
    steps.append({"what": "model", "which": which, "digest": None})

    which = None
    if inputs:
        which = f"{predicted['result']['images']:,} images, by {' version '.join(map(str, inputs['model']))}"
        if weights and inputs["weights"] != weights:
            which += f", another model (weights {inputs['weights'][:12]}…)"
    steps.append({"what": "predictions", "which": which, "digest": predicted.get("key")})
    return steps


def _keys(train_record, stages) -> list[tuple[str, str]]:
    """The key of each stage: a digest of its inputs, settings and version, and its folder's name in the store."""
    records = list(stages)
    if train_record and train_record["key"] not in {record["key"] for record in stages}:
        records.append(train_record)
    return [(f"{record['stage']}, version {record['version']}", record["key"]) for record in records]


def _otherwise(settings, train_record, checkpoint: Path | None) -> list[tuple[str, str, str]]:
    """Settings the training did not take as given: (name, given, taken), by a sweep or fitted to the data."""
    given = flatten(settings.model_dump(mode="json"))
    groups = (train_record or {}).get("settings") or {}
    taken = flatten({key: value for key, value in groups.items() if isinstance(value, dict)})
    file = Path(checkpoint) / "config.json" if checkpoint else None
    if file and file.is_file():
        taken |= flatten({"model": read_json(file)["model"]})
    return [
        (key, str(given[key]), str(value)) for key, value in taken.items() if key in given and given[key] != value
    ]


def _scalars(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values that fit in a line."""
    rows = []
    for key, value in values.items():
        key = key.replace("_", " ")
        if isinstance(value, dict) and value:
            rows.append((key, ", ".join(f"{name} {inner}" for name, inner in _scalars(value))))
        elif isinstance(value, float):
            rows.append((key, f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"))
        elif isinstance(value, int) and not isinstance(value, bool):
            rows.append((key, f"{value:,}"))
        elif isinstance(value, bool):
            rows.append((key, "yes" if value else "no"))
        elif isinstance(value, str):
            rows.append((key, value))
        elif value is None:
            rows.append((key, "none"))
    return rows


def _predicted(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What came of a batch of images, in lines: (what, how it was); result: of `predict_stage`."""
    def counted(numbers: dict[str, int], sign: str) -> str:
        most = sorted(numbers.items(), key=lambda one: -one[1])
        more = [f"and {len(most) - CLASSES} more"] if len(most) > CLASSES else []
        return ", ".join([f"{name}{sign}{number:,}" for name, number in most[:CLASSES]] + more)

    new, single, drift = result["new"], result["score_thresholds"].values(), result.get("drift")
    rows = [("images", f"{result['images']:,}, of which {result['rejected']:,} could not be used")]
    if result["reused_images"] and new["images"]:
        rows.append(("new", f"{new['images']:,}, the others from before"))
    rows += [("rejected because", counted(result["rejects"], ": "))] if result["rejects"] else []
    rows.append(("detections", f"{sum(result['detections'].values()):,}"))
    if result["detections"]:
        rows.append(("of each class", counted(result["detections"], ": ")))
    of_classes = f", of single classes {min(single):.3f} to {max(single):.3f}" if single else ""
    rows.append(("least score", f"{result['score_threshold']:.3f}{of_classes}"))
    if result["images_per_second"]:
        speed = f"{significant(result['images_per_second'])} images/s"
        rows.append(("speed", f"{speed}, {_seconds(result['seconds'])} in all"))
    if result["cost_per_1000_images"]:
        rows.append(("cost of 1,000 images", significant(result["cost_per_1000_images"])))
    if drift:
        since = f"the run of {drift['since'][:16].replace('T', ' ')} UTC, by version {drift['version']}"
        rows.append(("changed since", f"{since}: {' '.join(drift['words']) or 'no more than chance makes'}"))
    return [*rows, ("table", result["folder"]), ("digest of the images", result["input_digest"]),
            ("digest of the table", result["output_digest"])]  # fmt: skip


def _number(value: float | None) -> str:
    return "no ground truth" if value is None else f"{value:.3f}"


def _between(interval: list[float]) -> str:
    return f"between {interval[0]:.3f} and {interval[1]:.3f}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 10:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _has_curve(metrics: dict[str, Any], judged: str | None) -> bool:
    return judged is not None and metrics[judged]["precision_recall"]["precision"] is not None

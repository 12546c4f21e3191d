"""One page that says how good the model is, shows what it sees and where it errs, and where it came from."""
from __future__ import annotations

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import yaml
from PIL import Image

from detr.draw import class_colours, draw_truth_and_detections, picture_grid
from pipelines.charts import INK, LINES, new_figure, plain, style, svg
from pipelines.evaluate import coco_truth, detections_to_coco, match_detections
from pipelines.look import Finding
from pipelines.settings import RunSettings, UserError
from pipelines.shards import count_rejects, read_split, split_shards
from pipelines.stage import read_json
from pipelines.trials import BROAD, analyse, significant, trial_figures, trial_rows

SHOWN, MISTAKES = 12, 8  # pictures
PICTURE_SIDE = 480  # larger images are shrunk to this before they are drawn on
TRIALS = 30  # rows of the sweep's table
LOSSES = ("loss", "loss_ce", "loss_bbox", "loss_giou")


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
) -> dict[str, Any]:
    """Write report.html (one file, no script, nothing fetched), validation_grid.png and curves.png.

    evaluations: `evaluate`'s folder of each split; stages: records of `run_stage`, the training's also as
    train_record; registry: what `promote` returned; predictions: figures of a batch job, by name; findings:
    what `look_at_data` found; sweep: the content of a sweep's trials.json. What is None or empty is said in words, and
    its picture left out; without a sweep its section is.

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
                f"not on {dataset['digest']} in {dataset_folder}; evaluate again."
            )
    judged = next((split for split in ("test", "val", *metrics) if split in metrics), None)
    shown = next((split for split in ("val", judged) if split in metrics), None)
    names = [category["name"] for category in dataset["categories"]]
    past = read_json(history) if history is not None else {"steps": [], "validations": []}

    threshold, pictures, mistakes = None, [], []
    grid_path = curves_path = None
    if shown is not None:
        threshold = _threshold(metrics[shown], settings)
        scenes = _Scenes(dataset_folder, shown, dataset["categories"], evaluations[shown], threshold)
        mistakes = scenes.worst(settings.evaluate.max_dets)
        rows = scenes.rows(scenes.spread())
        drawn = [(row["file_name"], scenes.draw(row)) for row in rows]
        pictures = [{"name": name, "source": _jpeg(image)} for name, image in drawn]
        if drawn:
            grid_path = folder / "validation_grid.png"
            picture_grid([image for _, image in drawn]).save(grid_path, optimize=True)
    if past["steps"] or past["validations"]:
        curves_path = folder / "curves.png"
        _curves(past).savefig(curves_path, dpi=150)

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
        verdict=_verdict(metrics, judged, registry),
        tiles=_tiles(metrics, judged, dataset, train_record, past),
        loss_curve=svg(_loss_figure(past["steps"])) if past["steps"] else None,
        ap_curve=svg(_ap_figure(past["validations"])) if past["validations"] else None,
        pr_curve=svg(_pr_figure(metrics[judged])) if _has_curve(metrics, judged) else None,
        sweep=_sweep(sweep) if sweep else None,
        pictures=pictures,
        mistakes=mistakes,
        threshold=threshold,
        rejects=count_rejects(dataset_folder),
        findings=findings,
        stages=_stages(stages),
        registry=registry,
        training=_scalars((train_record or {}).get("result") or {}),
        predictions=_scalars(predictions or {}),
        settings=yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        lineage=_lineage(dataset, train_record, stages),
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


class _Scenes:
    """A split's images with its truth and what was found above the threshold."""

    def __init__(self, dataset_folder: Path, split: str, categories: list, evaluation: Path, threshold: float):

        self.shards = split_shards(dataset_folder, split)
        self.categories = categories
        self.names = [category["name"] for category in categories]
        self.colours = class_colours(self.names)
        columns = ["image_id", "file_name", "width", "height", "annotations"]
        self.truth = coco_truth(read_split(Path(dataset_folder), split, columns), categories)
        table = pq.read_table(Path(evaluation) / "detections.parquet")
        self.found = detections_to_coco(table, categories)
        keep = self.found["score"] >= threshold
        self.found = {key: values[keep] for key, values in self.found.items()}

    def rows(self, ids: list[int]) -> list[dict[str, Any]]:
        """The shard rows of some images, read alone, in the order of ids."""
        columns = ["image_id", "file_name", "image", "width", "height", "boxes", "labels"]
        source = pyarrow.dataset.dataset(self.shards)
        table = source.to_table(columns, filter=pc.field("image_id").isin(pa.array(ids, pa.int64())))
        rows = {row["image_id"]: row for row in table.to_pylist()}
        return [rows[image] for image in ids]

    def spread(self) -> list[int]:
        """SHOWN images evenly over the split; images with objects are preferred."""
        with_objects = {annotation["image_id"] for annotation in self.truth["annotations"]}
        ids = sorted(with_objects) or sorted(image["id"] for image in self.truth["images"])
        at = np.unique(np.linspace(0, len(ids) - 1, min(SHOWN, len(ids))).round().astype(int))
        return [ids[i] for i in at]

    def draw(self, row: dict[str, Any]) -> Image.Image:
        """The row's image with truth and detections on it."""
        from detr.transforms import decode_image

        image = decode_image(row["image"], row["width"] * row["height"])  # as large as ingest allowed
        mine = self.found["image_id"] == row["image_id"]
        boxes = self.found["bbox"][mine].copy()
        boxes[:, 2:] += boxes[:, :2]
        truth = np.array(row["boxes"], np.float64).reshape(-1, 4)
        scale = PICTURE_SIDE / max(image.size)
        if scale < 1:
            size = image.size
            image = image.resize([max(1, round(side * scale)) for side in size], Image.Resampling.LANCZOS)
            ratio = np.array(image.size * 2) / np.array(size * 2)
            boxes, truth = boxes * ratio, truth * ratio
        by_id = {category["id"]: category["name"] for category in self.categories}
        return draw_truth_and_detections(
            image,
            truth,
            [self.names[label] for label in row["labels"]],
            boxes,
            [by_id[category] for category in self.found["category_id"][mine].tolist()],
            self.found["score"][mine].tolist(),
            self.colours,
        )

    def worst(self, max_dets: int) -> list[dict[str, str]]:
        """The pictures with the most and most confident mistakes, each with a caption in words."""
        found, matches = match_detections(self.truth, self.found, max_dets)
        by_id = {category["id"]: category["name"] for category in self.categories}
        objects, wrong, kept = defaultdict(list), defaultdict(list), Counter(found["image_id"].tolist())
        for at, annotation in enumerate(self.truth["annotations"]):
            if not annotation["iscrowd"] and annotation["reject"] is None:
                objects[annotation["image_id"]].append(at)
        for at in np.flatnonzero(matches < 0).tolist():
            wrong[int(found["image_id"][at])].append(at)
        hit = set(matches.tolist())

        ranked = []
        for image in self.truth["images"]:
            here = objects[image["id"]]
            missed = [at for at in here if at not in hit]
            false = sorted(wrong[image["id"]], key=lambda at: -found["score"][at])
            badness = len(missed) + sum(float(found["score"][at]) for at in false)
            if badness:
                ranked.append((-badness, image["id"], here, missed, false))
        ranked.sort(key=lambda item: item[:2])
        ranked = ranked[:MISTAKES]

        rows = self.rows([item[1] for item in ranked])
        result = []
        for row, (_, image, here, missed, false) in zip(rows, ranked, strict=True):
            words = self._words(found, by_id, here, missed, false, kept[image])
            more = len(words) - 3
            caption = "; ".join(words[:3]) + (f"; and {more} more" if more > 0 else "")
            result.append({"name": row["file_name"], "caption": caption, "source": _jpeg(self.draw(row))})
        return result

    def _words(self, found, by_id, here, missed, false, kept) -> list[str]:
        """What went wrong in one image, the gravest first."""
        if here and not kept:
            there = "is 1 object" if len(here) == 1 else f"are {len(here)} objects"
            return [f"found nothing here, where there {there}"]
        annotations = self.truth["annotations"]
        boxes = np.array([annotations[at]["bbox"] for at in here], np.float64).reshape(-1, 4)
        words, taken = [], set()
        for at in false:
            name, score = by_id[int(found["category_id"][at])], found["score"][at]
            overlap = _iou_xywh(found["bbox"][at], boxes)
            order = np.argsort(-overlap)
            same = [i for i in order if by_id[annotations[here[i]]["category_id"]] == name]
            other = [i for i in order if i not in same and overlap[i] >= 0.5]
            if other:
                taken.add(here[other[0]])
                there = by_id[annotations[here[other[0]]]["category_id"]]
                words.append(f"‘{name}’ found at {score:.2f} where there is a ‘{there}’")
            elif same and overlap[same[0]] >= 0.5:
                words.append(f"‘{name}’ found a second time at {score:.2f}")
            elif same and overlap[same[0]] >= 0.1:
                words.append(f"‘{name}’ found at {score:.2f}, but out of place (IoU {overlap[same[0]]:.2f})")
            else:
                words.append(f"‘{name}’ found at {score:.2f} where nothing is labelled")
        total = Counter(by_id[annotations[at]["category_id"]] for at in here)
        lost = Counter(by_id[annotations[at]["category_id"]] for at in missed if at not in taken)
        misses = [
            f"missed ‘{name}’" if total[name] == 1 else f"missed {count} of {total[name]} ‘{name}’"
            for name, count in lost.most_common()
        ]
        return misses[:1] + words + misses[1:]


def _threshold(metrics: dict[str, Any], settings: RunSettings) -> float:
    """Above which score a detection is drawn: where F1 is best on these images."""
    best = (metrics["best_f1"] or {}).get("threshold")
    return next(value for value in (best, settings.predict.score_threshold, 0.5) if value is not None)


def _verdict(metrics: dict[str, Any], judged: str | None, registry: dict[str, Any] | None) -> dict[str, str]:
    """The headline, the registry's word on it, and one plain sentence."""
    if judged is None:
        headline, sentence = "Not measured", "No evaluation was given, so nothing is known about its quality."
    else:
        found = metrics[judged]
        headline = f"AP {_number(found['AP'])}, AP50 {_number(found['AP50'])} on the {judged} split"
        best = found["best_f1"]
        if best is None:
            sentence = f"The {judged} split has no ground truth to measure against."
        elif best["threshold"] is None:
            sentence = f"It finds nothing at all in the {found['images']} images of the {judged} split."
        else:
            sentence = (
                f"At its best threshold, a score of {best['threshold']:.2f}, it finds {best['recall']:.0%} of the "
                f"objects in the {found['images']:,} images, and {best['precision']:.0%} of what it finds is right."
            )
    if registry is None:
        kind, word, reason = "absent", "No verdict on promotion:", "nothing was registered in this run."
    elif registry["promoted"]:
        kind, word, reason = "yes", "Promoted.", f"{registry['reason']} Champion: version {registry['champion']}."
    else:
        champion = registry["champion"]
        stays = f"The champion stays version {champion}." if champion else "There is no champion."
        kind, word, reason = "no", "Not promoted.", f"{registry['reason']} {stays}"
    return {"headline": headline, "sentence": sentence, "kind": kind, "word": word, "reason": reason}


def _tiles(metrics, judged, dataset, train_record, past) -> list[dict[str, str]]:
    tiles = []
    if judged is not None:
        found = metrics[judged]
        best = found["best_f1"] or {}
        tiles += [
            {"label": "AP", "value": _number(found["AP"]), "note": f"{judged} split, IoU .50 to .95"},
            {"label": "AP50", "value": _number(found["AP50"]), "note": f"{judged} split, IoU .50"},
            {"label": "Best F1", "value": _number(best.get("f1")), "note": (
                f"at score {best['threshold']:.2f}" if best.get("threshold") is not None else "no threshold")},
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


def _stages(stages: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not stages:
        return None
    longest = max(record["seconds"] for record in stages) or 1
    return {
        "rows": [
            {
                "stage": record["stage"],
                "seconds": record["seconds"],
                "share": round(100 * record["seconds"] / longest, 1),
                "reused": bool(record.get("reused")),
            }
            for record in stages
        ],
        "total": sum(record["seconds"] for record in stages if not record.get("reused")),
        "saved": sum(record["seconds"] for record in stages if record.get("reused")),
    }


def _lineage(dataset, train_record, stages) -> list[tuple[str, str]]:
    rows = [(f"dataset {dataset['name']}", dataset["digest"])]
    for split, figures in dataset["splits"].items():
        rows.append((f"{split} split, from {figures['annotations_file']}", figures["digest"]))
    records = list(stages)
    if train_record and train_record["key"] not in {record["key"] for record in stages}:
        records.append(train_record)
    rows += [(f"stage {record['stage']}, version {record['version']}", record["key"]) for record in records]
    return rows


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


def _number(value: float | None) -> str:
    return "no ground truth" if value is None else f"{value:.3f}"


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 10:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _iou_xywh(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of one box [4] with others [N, 4], xywh."""
    sides = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = sides.clip(0).prod(axis=1)
    return shared / np.maximum(box[2:].prod() + others[:, 2:].prod(axis=1) - shared, 1e-9)


def _jpeg(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _draw_losses(axes, steps: list[dict[str, Any]]) -> None:
    """Each loss over the steps, averaged over at most 300 stretches."""
    stretches = np.array_split(np.arange(len(steps)), min(300, len(steps)))
    for name, colour in zip(LOSSES, LINES, strict=False):
        if any(step.get(name) is None for step in steps):
            continue
        values = np.array([step[name] for step in steps], float)
        at = [steps[stretch[-1]]["step"] for stretch in stretches]
        means = [values[stretch].mean() for stretch in stretches]
        axes.plot(at, means, color=colour, linewidth=2 if name == "loss" else 1.2, label=name)
    style(axes, "step", "loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)


def _draw_ap(axes, validations: list[dict[str, Any]]) -> None:
    for name, colour in (("AP50", LINES[1]), ("AP", LINES[0])):
        points = [(v["step"], v[name]) for v in validations if v.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=2, label=name)
    style(axes, "step", "average precision, validation")
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=9)


def _loss_figure(steps):
    figure = new_figure()
    _draw_losses(figure.subplots(), steps)
    return figure


def _ap_figure(validations):
    figure = new_figure()
    _draw_ap(figure.subplots(), validations)
    return figure


def _curves(past):
    """Losses and AP side by side, as one picture."""
    parts = [(draw, past[key]) for draw, key in ((_draw_losses, "steps"), (_draw_ap, "validations")) if past[key]]
    figure = new_figure(4.8 * len(parts), 3.2)
    for axes, (draw, values) in zip(np.ravel(figure.subplots(1, len(parts))), parts, strict=True):
        draw(axes, values)
    return figure


def _has_curve(metrics: dict[str, Any], judged: str | None) -> bool:
    return judged is not None and metrics[judged]["precision_recall"]["precision"] is not None


def _pr_figure(metrics: dict[str, Any]):
    """Precision over recall at IoU 0.5: the mean over classes, up to ten classes, the best threshold."""
    figure = new_figure(5.6, 4.2)
    axes = figure.subplots()
    curve = metrics["precision_recall"]
    classes = [
        (c["name"], values) for c, values in zip(metrics["per_class"], curve["per_class"], strict=True) if values
    ]
    if 1 < len(classes) <= len(LINES) - 1:
        for (name, values), colour in zip(classes, LINES[1:], strict=False):
            axes.plot(curve["recall"], values, color=colour, linewidth=1.2, label=" " + plain(name))
    axes.plot(curve["recall"], curve["precision"], color=LINES[0], linewidth=2.4, label="mean over classes")
    best = metrics["best_f1"]
    if best["threshold"] is not None:
        axes.plot(best["recall"], best["precision"], "o", color=INK, markersize=6,
                  label=f"best F1, score {best['threshold']:.2f}")  # fmt: skip
    style(axes, "recall", "precision")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    return figure

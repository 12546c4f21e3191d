"""Detect on one image, a folder, a bucket prefix or a list."""
from __future__ import annotations

from pathlib import Path

import click

from jobs.common import job, ray_session, read_image

SHOWN = 8  # classes and reasons in what is printed


@click.option("--input", "given", metavar="INPUT", help="The same as the argument INPUT.")
@click.option("--model", metavar="models:/NAME@champion|FOLDER", help="By default the champion for this dataset.")
@click.option("--output", metavar="FOLDER|s3://...", help="Where the table goes; by default into the store. With "
              "--show the picture, by default NAME.detections.png here.")  # fmt: skip
@click.option("--column", metavar="NAME", help="Of a CSV or Parquet INPUT: the column that names the images.")
@click.option("--coco", metavar="FILE", help="Write the detections as COCO's results JSON, too.")
@click.option("--save-images", type=click.IntRange(1), metavar="N", help="Draw the detections on N of the images, too.")
@click.option("--show", is_flag=True, help="INPUT is one image: write it with its detections drawn, without Ray.")
@job("detr predict s3://bucket/photos --model models:/sample@champion --output s3://bucket/found", takes_input=True)
def main(
    settings, store: Path, inputs: list[str], given: str | None, model: str | None, output: str | None,
    column: str | None, coco: str | None, save_images: int | None, show: bool,
) -> dict:  # fmt: skip
    """Run a model over INPUT and write a Parquet table of detections, or show them on one image.

    INPUT is an image, a folder, an s3:// prefix, a text file of names, a CSV or Parquet file with a column of URIs, or
    a COCO file whose images are meant. What an output has already is not done again: stopped, the same command goes
    on; later, it takes the new images alone.
    """
    from pipelines.results import check_coco, coco_ids
    from pipelines.settings import UserError
    from pipelines.storage import filesystem
    from pipelines.workflow import find_model, predict_stage

    named = [*inputs, *([given] if given else [])]
    if len(named) != 1:
        raise UserError("Say which images: detr predict INPUT, where INPUT is one image, folder, prefix or list.", 2)
    images = named[0]
    if show:
        return _show(settings, store, Path(images), model, output)
    filesystem(images)  # what is not there is said before a model is fetched
    ids = None
    if coco:
        check_coco(coco)
        if images.lower().endswith(".json") and not Path(images).is_dir():
            ids = coco_ids(images)
    checkpoint, name, version = find_model(settings, store, model)
    record = predict_stage(
        settings, store, images, checkpoint, name, version, output, column, lambda: ray_session(settings)
    )
    result = record["result"]
    files, said = _files(settings, checkpoint, result["folder"], coco, ids, save_images)
    return {
        **result, **files, "record": record["folder"], "reused": record["reused"],
        "text": "\n".join([*_summary(settings, result), *said]),
    }  # fmt: skip


def _summary(settings, result: dict) -> list[str]:
    """What came of it, for people."""
    from pipelines.progress import duration

    new = result["new"]
    lines = [
        f"{result['ok']:,} of {result['images']:,} images, {sum(result['detections'].values()):,} detections, "
        f"{result['rejected']:,} rejected: {result['folder']}"
    ]
    if result["reused_images"]:
        lines.append(f"{new['images']:,} of them new, {result['reused_images']:,} from before.")
    found = sorted(result["detections"].items(), key=lambda one: -one[1])
    lines += [f"  {number:,} {name}" for name, number in found[:SHOWN]]
    if len(found) > SHOWN:
        lines.append(f"  and {len(found) - SHOWN} more classes")
    reasons = list(result["rejects"].items())
    lines += [f"  rejected: {number:,} because {reason}" for reason, number in reasons[:SHOWN]]
    if len(reasons) > SHOWN:
        lines.append(f"  and for {len(reasons) - SHOWN} more reasons")
    if new["images"] and result["images_per_second"]:
        cost = result["cost_per_1000_images"]
        lines.append(f"{result['images_per_second']:,} images/s, {duration(result['seconds'])} in all" + (
            f", {cost:,} for 1,000 images" if cost else ""))  # fmt: skip
    drift = result.get("drift")
    if drift:
        run = f"the run of {drift['since'][:16].replace('T', ' ')} UTC by version {drift['version']}"
        words = [f"Compared with {run}:", *(f"  {sentence}" for sentence in drift["words"])]
        lines += words if drift["words"] else [f"No more change since {run} than chance makes."]
    return lines


def _files(
    settings, checkpoint: Path, folder: str, coco: str | None, ids: dict[str, int] | None, number: int | None
) -> tuple[dict, list[str]]:
    """What was asked for beside the table: where it is, and what to say of it."""
    from pipelines.results import save_pictures, write_coco
    from pipelines.stage import read_json

    files, categories = {}, read_json(checkpoint / "config.json")["categories"]
    said = []
    if coco:
        named, left_out = write_coco(folder, Path(coco), categories, ids)
        files |= {"coco": [str(path) for path in (coco, named) if path], "coco_left_out": left_out}
        said += files["coco"]
        if left_out:
            said.append(f"{left_out:,} images of the table are no longer in the COCO file, and not in {coco}.")
    if number:
        classes = [category["name"] for category in categories]
        files["pictures"] = save_pictures(folder, number, settings.predict.max_pixels, classes)
        said += files["pictures"]
    return files, said


def _show(settings, store: Path, path: Path, model: str | None, output: str | None) -> dict:
    from detr.checkpoint import CheckpointError
    from detr.draw import draw_detections
    from pipelines.detect import Detector, label_thresholds
    from pipelines.predict import thresholds
    from pipelines.settings import UserError
    from pipelines.stage import read_json
    from pipelines.storage import not_done
    from pipelines.workflow import find_model

    image = read_image(settings, path)
    checkpoint, name, version = find_model(settings, store, model)
    try:
        detector = Detector.load(checkpoint)
    except CheckpointError as error:
        raise UserError(f"{error}.", 2) from error
    threshold, of_classes = thresholds(settings, read_json(checkpoint / "config.json"))
    least = label_thresholds(detector.categories, threshold, of_classes)
    (found,) = detector.detect([image], least)
    boxes, scores = found["boxes"], found["scores"]
    names = [detector.categories[label]["name"] for label in found["labels"]]
    target = Path(output) if output else Path(f"{path.stem}.detections.png")
    try:
        draw_detections(image, boxes, names, scores).save(target)
    except OSError as error:
        raise not_done(target, "written", error) from error
    except ValueError as error:  # of Pillow: an extension that it does not know
        raise UserError(f"{target} cannot be written: {error}.", 2) from error
    detections = [
        {"name": n, "score": round(float(s), 4), "box": [round(float(v), 1) for v in b]}
        for n, s, b in zip(names, scores, boxes, strict=True)
    ]
    lines = [f"{d['name']} {d['score']:.2f} at {d['box']}" for d in detections] or ["Nothing found."]
    return {
        "image": str(path), "picture": str(target), "model": f"{name} version {version}",
        "score_threshold": threshold, "score_thresholds": of_classes, "detections": detections,
        "text": "\n".join([*lines, str(target)]),
    }  # fmt: skip


if __name__ == "__main__":
    main()

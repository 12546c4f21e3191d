"""Detect on one image, a folder, a bucket prefix or a list."""
from __future__ import annotations

from pathlib import Path

import click

from jobs.common import job, ray_session, read_image


@click.option("--input", "given", metavar="INPUT", help="The same as the argument INPUT.")
@click.option("--model", metavar="models:/NAME@champion|FOLDER", help="By default the champion for this dataset.")
@click.option("--show", is_flag=True, help="INPUT is one image: write it with its detections drawn, without Ray.")
@click.option("--output", metavar="FILE", help="The picture --show writes; by default NAME.detections.png here.")
@job("detr predict path/to/images --model models:/sample@champion", takes_input=True)
def main(
    settings, store: Path, inputs: list[str], given: str | None, model: str | None, show: bool, output: str | None
) -> dict:
    """Run a model over INPUT and write a Parquet table of detections, or show them on one image.

    INPUT is an image, a folder, an s3:// prefix, a text file of names, or a COCO file whose images are meant.
    """
    from pipelines.settings import UserError
    from pipelines.workflow import find_model

    named = [*inputs, *([given] if given else [])]
    if len(named) != 1:
        raise UserError("Say which images: detr predict INPUT, where INPUT is one image, folder, prefix or list.", 2)
    images = named[0]
    if show:
        return _show(settings, store, Path(images), model, output)
    from pipelines.predict import list_images
    from pipelines.workflow import predict_stage

    list_images(images, settings)  # what is wrong is said before Ray starts
    checkpoint, name, version = find_model(settings, store, model)
    with ray_session(settings):
        record = predict_stage(settings, store, images, checkpoint, name, version)
    result = record["result"]
    text = (
        f"{result['ok']} of {result['images']} images, {sum(result['detections'].values())} detections, "
        f"{result['rejected']} rejected: {record['folder']}"
    )
    return {**result, "folder": record["folder"], "reused": record["reused"], "text": text}


def _show(settings, store: Path, path: Path, model: str | None, output: str | None) -> dict:
    from detr.checkpoint import CheckpointError
    from detr.draw import draw_detections
    from pipelines.detect import Detector, label_thresholds
    from pipelines.predict import thresholds
    from pipelines.settings import UserError
    from pipelines.stage import read_json
    from pipelines.workflow import find_model

    image = read_image(settings, path)
    checkpoint, name, version = find_model(settings, store, model)
    try:
        detector = Detector.load(checkpoint)
    except CheckpointError as error:
        raise UserError(f"{error}.") from error
    threshold, of_classes = thresholds(settings, read_json(checkpoint / "config.json"))
    least = label_thresholds(detector.categories, threshold, of_classes)
    found = detector.detect([image])[0]
    keep = found["scores"] >= least[found["labels"]]
    boxes, scores = found["boxes"][keep], found["scores"][keep]
    names = [detector.categories[label]["name"] for label in found["labels"][keep]]
    target = Path(output) if output else Path(f"{path.stem}.detections.png")
    draw_detections(image, boxes, names, scores).save(target)
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

"""Draw where the model looks in one image, and each query over many."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from jobs.common import job, read_image

POINTS, PANELS = 5, 12  # as many of the surest detections are drawn in the encoder's and the decoder's picture


@click.option("--model", metavar="models:/NAME@champion|FOLDER", help="By default the champion for this dataset.")
@click.option("--output", metavar="FOLDER", help="Where the pictures go; by default NAME.explained here.")
@click.option("--points", metavar="'X,Y X,Y ...'", help="Where the encoder's attention starts, in pixels of the image; "
              f"by default the centres of the {POINTS} surest detections.")  # fmt: skip
@click.option("--dataset", metavar="IMAGES", help="Images, given as to predict: draw where each query looks over them.")
@job("detr explain photo.jpg --points '120,80 300,200' --dataset path/to/images", takes_input=True)
def main(
    settings, store: Path, inputs: list[str], model: str | None, output: str | None, points: str | None,
    dataset: str | None,
) -> dict:  # fmt: skip
    """Draw where a model looks in one image.

    \b
    detections.jpg         the detections
    encoder_attention.png  self-attention of the last encoder layer, from some points to the whole image
    decoder_attention.png  cross-attention of the last decoder layer, of the queries with the surest detections
    queries.png            with --dataset: the centres of every query's boxes over all its images
    """  # fmt: skip
    from pipelines.settings import UserError

    if len(inputs) != 1:
        raise UserError("Say which one image: detr explain IMAGE (several --points stand in one pair of quotes).", 2)
    path = Path(inputs[0])
    image = read_image(settings, path)
    places = _points(points, image.size) if points is not None else None
    entries = []
    if dataset is not None:
        from pipelines.listing import list_images

        entries = list_images(dataset, settings)

    from detr.checkpoint import CheckpointError, load_checkpoint
    from detr.draw import draw_queries
    from detr.explain import boxes_of_queries, explain
    from detr.segmentation import DETRsegm
    from pipelines.detect import label_thresholds
    from pipelines.predict import thresholds
    from pipelines.storage import not_done
    from pipelines.workflow import find_model

    checkpoint, name, version = find_model(settings, store, model)
    try:
        network, config = load_checkpoint(checkpoint)
    except CheckpointError as error:
        raise UserError(f"{error}.", 2) from error
    if isinstance(network, DETRsegm):
        network = network.detr
    threshold, of_classes = thresholds(settings, config)
    least = label_thresholds(config["categories"], threshold, of_classes)
    folder = Path(output) if output else Path(f"{path.stem}.explained")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_done(folder, "made", error) from error

    found = explain(network, image, least)
    names = [config["categories"][label]["name"] for label in found.labels]
    certain = int((found.scores >= least[found.labels]).sum())
    pictures = _pictures(image, found, names, certain, [c["name"] for c in config["categories"]], places)
    of_class = ", or its class's own," if of_classes else ""
    lines = [] if certain else [
        f"Nothing found with a score of {threshold:.2f}{of_class} or more; the surest query is drawn."
    ]  # fmt: skip
    detections = [
        {"query": int(q), "name": n, "score": round(float(s), 4), "box": [round(float(v), 1) for v in b]}
        for q, n, s, b in zip(found.queries, names, found.scores, found.boxes, strict=True)
    ][:certain]
    lines += [f"{d['name']} {d['score']:.2f} at {d['box']}, query {d['query']}" for d in detections]
    if found.from_cell is None:
        lines.append("The model has no encoder layer, so there is no encoder_attention.png.")
    rejects: Counter[str] = Counter()
    if entries:
        boxes = boxes_of_queries(network, _decoded(entries, settings, rejects), settings.predict.batch_size)
        if not len(boxes):
            raise UserError(f"None of the {len(entries)} images of {dataset} can be used: {next(iter(rejects))}.", 2)
        pictures["queries.png"] = draw_queries(boxes)
        lines.append(f"Each query over {len(boxes)} images, {rejects.total()} rejected.")
    for file, picture in pictures.items():
        picture.save(folder / file)
        lines.append(str(folder / file))
    return {
        "image": str(path), "folder": str(folder), "pictures": list(pictures), "model": f"{name} version {version}",
        "score_threshold": threshold, "score_thresholds": of_classes, "detections": detections,
        "dataset_images": len(entries), "rejects": dict(rejects.most_common()), "text": "\n".join(lines),
    }  # fmt: skip


def _pictures(image, found, names: list[str], certain: int, classes: list[str], places) -> dict:
    """The pictures of one image by their files' names; of the detections the first `certain` reach the threshold."""
    import numpy as np

    from detr.draw import class_colours, draw_decoder_attention, draw_detections, draw_encoder_attention

    by_name = class_colours(classes)
    colours = [by_name[name] for name in names]
    sure, some = slice(certain), slice(PANELS)
    pictures = {
        "detections.jpg": draw_detections(image, found.boxes[sure], names[sure], found.scores[sure], colours[sure]),
        "decoder_attention.png": draw_decoder_attention(
            image, found.decoder_attention(PANELS), found.boxes[some], names[some], found.scores[some], colours[some]
        ),
    }
    if found.from_cell is not None:
        if places is None:
            centres = (found.boxes[:POINTS, :2] + found.boxes[:POINTS, 2:]) / 2
            places = np.minimum(centres, np.array(image.size) - 1)  # the centre of an empty box may be on the edge
        pictures["encoder_attention.png"] = draw_encoder_attention(image, found.encoder_attention(places), places)
    return pictures


def _points(text: str, size: tuple[int, int]) -> list[list[float]]:
    """'X,Y X,Y ...' in pixels -> [[x, y], ...]; UserError for what is no point of an image of this size."""
    from pipelines.settings import UserError

    number = r"\d+(?:\.\d+)?"
    places = []
    for word in text.split():
        if not re.fullmatch(f"{number},{number}", word):
            raise UserError(f"--points has {word!r}, which is no point; write X,Y in pixels, such as 120,80.", 2)
        places.append([float(value) for value in word.split(",")])
        if any(value >= side for value, side in zip(places[-1], size, strict=True)):
            raise UserError(f"--points has {word}, which lies outside the image of {size[0]}x{size[1]} pixels.", 2)
    if not places:
        raise UserError("--points has no point; write X,Y in pixels, such as 120,80.", 2)
    return places


def _decoded(entries: list, settings, rejects: Counter[str]) -> Iterator:
    """The images that can be used, one after another; the others' reasons are counted."""
    from detr.transforms import ImageError, decode_image
    from pipelines.predict import fetched
    from pipelines.progress import track

    images = [entry._asdict() for entry in entries]
    for data, reason in track(fetched(images), "images", len(images)):
        try:
            if reason is not None:
                raise ImageError(reason)
            yield decode_image(data, settings.predict.max_pixels)
        except ImageError as error:
            rejects[str(error)] += 1


if __name__ == "__main__":
    main()

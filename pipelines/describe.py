"""What an ingested dataset holds: figures, classes, sizes of boxes, in words and as a picture."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from rich.bar import Bar
from rich.table import Table
from rich.text import Text

from detr.draw import class_colours, draw_detections
from detr.transforms import decode_image
from pipelines.shards import count_rejects, flat_values, parents, read_split, split_shards
from pipelines.stage import read_json

FIGURES = ["width", "height", "exif_orientation", "boxes", "labels"]
# Sides of boxes as shares of their image's: the square root of the share of the area.
SIZES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, np.inf)
SHOWN = 3  # of the sizes that images have
BAR = 24  # characters
REASONS = 20  # in a table; the result has them all
COLUMNS = 4  # of images in the picture
CLASSES = 30  # in the picture, the commonest
PANEL = 640  # pixels of an image's longer side in it


def describe(dataset_folder: Path | str) -> dict[str, Any]:
    """The figures of an ingested dataset; no image is read.

    Returns {"name", "digest", "splits": {split: {"images", "empty": images without a box, "boxes", "boxes_per_image":
    {"median", "most"}, "image_sizes": [[width, height, images], ...] the commonest first, "turned": images with an
    EXIF orientation}}, "classes": [{"name", split: {"boxes", "images"}, ...}, ...], "box_sizes": [{"from", "to":
    shares of the image's side, None for no end, split: boxes, ...}, ...], "rejected": [{"split", "kind": "image" or
    "annotation", "reason", "count"}, ...]}. Raises UserError where there is no dataset.
    """
    folder = Path(dataset_folder)
    dataset = read_json(folder / "dataset.json")
    names = [category["name"] for category in dataset["categories"]]
    classes: list[dict[str, Any]] = [{"name": name} for name in names]
    sizes: list[dict[str, Any]] = [
        {"from": low, "to": None if np.isinf(high) else high} for low, high in pairwise(SIZES)
    ]
    splits = {}
    for split in dataset["splits"]:
        table = read_split(folder, split, FIGURES)
        counts = pc.list_value_length(table["labels"]).to_numpy()
        shapes = np.stack([table["width"].to_numpy(), table["height"].to_numpy()], 1)
        boxes, labels = flat_values(table["boxes"]).reshape(-1, 4), flat_values(table["labels"])
        image = parents(table["labels"])
        splits[split] = {
            "images": len(table),
            "empty": int((counts == 0).sum()),
            "boxes": len(boxes),
            "boxes_per_image": {"median": float(np.median(counts)), "most": int(counts.max(initial=0))},
            "image_sizes": [[*shape, n] for shape, n in Counter(map(tuple, shapes.tolist())).most_common()],
            "turned": int((table["exif_orientation"].to_numpy() != 1).sum()),
        }
        per_class = np.bincount(labels, minlength=len(names))
        pairs = np.unique(image * len(names) + labels)
        images = np.bincount(pairs % len(names), minlength=len(names))
        for row, of_boxes, of_images in zip(classes, per_class.tolist(), images.tolist(), strict=True):
            row[split] = {"boxes": of_boxes, "images": of_images}
        share = np.sqrt((boxes[:, 2:] - boxes[:, :2]).astype(np.float64).prod(1) / shapes[image].prod(1))
        for row, count in zip(sizes, np.histogram(share, SIZES)[0].tolist(), strict=True):
            row[split] = count
    return {
        "name": dataset["name"], "digest": dataset["digest"], "splits": splits, "classes": classes,
        "box_sizes": sizes, "rejected": count_rejects(folder),
    }  # fmt: skip


def description_tables(found: dict[str, Any]) -> Iterator[Table]:
    """The figures of `describe` for a terminal."""
    splits = found["splits"]
    table = _table(
        Text(f"Dataset {found['name']}"), "", "images", "without a box", "turned by EXIF", "boxes", "boxes per image",
        "sizes of images",
    )  # fmt: skip
    for split, part in splits.items():
        each = part["boxes_per_image"]
        shapes = [f"{width}x{height} ({n:,})" for width, height, n in part["image_sizes"][:SHOWN]]
        more = len(part["image_sizes"]) - SHOWN
        table.add_row(
            split, f"{part['images']:,}", f"{part['empty']:,}", f"{part['turned']:,}", f"{part['boxes']:,}",
            f"{each['median']:g}, {each['most']} at most",
            ", ".join(shapes) + (f" and {more:,} more" if more > 0 else ""),
        )  # fmt: skip
    yield table

    table = _table("Boxes of each class (and images they are in)", "", *splits, "share")
    total = max(1, sum(part["boxes"] for part in splits.values()))
    order = sorted(found["classes"], key=lambda row: -sum(row[split]["boxes"] for split in splits))
    most = max((sum(row[split]["boxes"] for split in splits) for row in order), default=0)
    for row in order:
        boxes = sum(row[split]["boxes"] for split in splits)
        cells = (f"{row[split]['boxes']:,} ({row[split]['images']:,})" for split in splits)
        table.add_row(Text(row["name"]), *cells, f"{boxes / total:.1%}", Bar(max(1, most), 0, boxes, width=BAR))
    yield table

    table = _table("Boxes by size, in shares of the image's side", "", *splits, "share")
    most = max(sum(row[split] for split in splits) for row in found["box_sizes"])
    for row in found["box_sizes"]:
        boxes = sum(row[split] for split in splits)
        cells = (f"{row[split]:,}" for split in splits)
        table.add_row(_range(row), *cells, f"{boxes / total:.1%}", Bar(max(1, most), 0, boxes, width=BAR))
    yield table

    if found["rejected"]:
        table = Table(title="Rejected", title_justify="left")
        for column in ("split", "kind", "reason"):
            table.add_column(column, overflow="fold")
        table.add_column("count", justify="right")
        for row in found["rejected"][:REASONS]:
            table.add_row(row["split"], row["kind"], Text(row["reason"]), f"{row['count']:,}")
        yield table


def draw_dataset(
    dataset_folder: Path | str, found: dict[str, Any], split: str, images: int, seed: int, max_pixels: int
) -> Image.Image:
    """A page as a picture: boxes of each class, boxes by size, and some images of a split with their boxes.

    The images are drawn at random by the seed. Raises UserError for a split that there is not.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [category["name"] for category in found["classes"]]
    pictures = list(_some_images(Path(dataset_folder), split, names, images, seed, max_pixels))
    rows = -(-len(pictures) // COLUMNS)
    splits = list(found["splits"])
    total = [sum(row[split]["boxes"] for split in splits) for row in found["classes"]]
    order = sorted(range(len(names)), key=lambda k: -total[k])[:CLASSES][::-1]  # from below
    tall = max(3.2, 0.2 * len(order) + 1)  # inches
    figure = Figure(figsize=(14, tall + 2.8 * rows), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    top, grid = figure.subfigures(2, 1, height_ratios=[tall, max(0.1, 2.8 * rows)])
    by_class, by_size = top.subplots(1, 2)

    labels = [_range(row) for row in found["box_sizes"]]
    left, bottom = np.zeros(len(order)), np.zeros(len(labels))
    for name in splits:
        boxes = np.array([found["classes"][k][name]["boxes"] for k in order])
        by_class.barh(range(len(order)), boxes, left=left, label=name)
        left += boxes
        boxes = np.array([row[name] for row in found["box_sizes"]])
        by_size.bar(labels, boxes, bottom=bottom, label=name)
        bottom += boxes
    by_class.set_yticks(range(len(order)), [_short(names[k]) for k in order])
    which = f"the {len(order)} commonest of {len(names)}" if len(names) > len(order) else f"{len(names)}"
    for label in by_class.get_yticklabels():
        label.set_parse_math(False)
    by_class.set_title(f"{found['name']}: boxes of {which} classes", parse_math=False)
    by_class.set_xlabel("boxes")
    by_size.set(title="boxes by size", xlabel="side of the box, as a share of the image's", ylabel="boxes")
    by_class.legend()
    if pictures:
        grid.suptitle(f"{len(pictures)} images of {split}, drawn at random")
        for axes, (name, picture) in zip(grid.subplots(rows, COLUMNS, squeeze=False).flat, pictures, strict=False):
            axes.imshow(picture)
            axes.set_title(_short(name), fontsize=8, parse_math=False)  # a name may hold a $
        for axes in grid.axes:
            axes.axis("off")
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def _some_images(
    folder: Path, split: str, names: Sequence[str], images: int, seed: int, max_pixels: int
) -> Iterator[tuple[str, Image.Image]]:
    """(file name, image with its boxes drawn), at random, in order of the shards."""
    colours = class_colours(names)
    shards = split_shards(folder, split)
    rows = [pq.read_metadata(shard).num_rows for shard in shards]
    starts = np.cumsum([0, *rows])
    chosen = np.sort(np.random.default_rng(seed).permutation(starts[-1])[:images])
    for shard, start, end in zip(shards, starts, starts[1:], strict=False):
        mine = chosen[(chosen >= start) & (chosen < end)] - start
        file, at = pq.ParquetFile(shard), 0
        for group in range(file.num_row_groups):
            here = file.metadata.row_group(group).num_rows
            wanted, at = mine[(mine >= at) & (mine < at + here)] - at, at + here
            if not len(wanted):
                continue
            for row in file.read_row_group(group, ["file_name", "image", "boxes", "labels"]).take(wanted).to_pylist():
                labels = [names[label] for label in row["labels"]]
                image = decode_image(row["image"], max_pixels)
                image = draw_detections(image, row["boxes"], labels, None, [colours[label] for label in labels])
                image.thumbnail((PANEL, PANEL))
                yield row["file_name"], image


def _table(title: Text | str, *columns: str) -> Table:
    """A table whose first column is named, and whose others hold numbers."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    if columns[-1] == "share":
        table.add_column("")  # the same as a bar
    return table


def _range(row: dict[str, Any]) -> str:
    """A class of sizes in words."""
    return f"{row['from']:.0%} and more" if row["to"] is None else f"{row['from']:.0%} to {row['to']:.0%}"


def _short(name: str, most: int = 32) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"

"""The report's pictures: its best, typical and worst images, and where the model looks in some of them."""
from __future__ import annotations

import base64
import io
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
from PIL import Image

from detr.draw import class_colours, draw_decoder_attention, draw_truth_and_detections
from detr.transforms import decode_image
from pipelines.errors import BACKGROUND, DUPLICATE, KINDS, POOR_BOX, WRONG_CLASS, kinds_of_errors
from pipelines.evaluate import coco_truth, detections_to_coco
from pipelines.matching import IOUS, match, overlaps
from pipelines.shards import read_split, split_shards

SPREAD = 12  # pictures of the whole split
BEST, TYPICAL, WORST = 6, 6, 9
PANELS = 4  # detections whose attention is drawn in one image
PICTURE_SIDE = 480  # larger images are shrunk to this before they are drawn on


class Scenes:
    """A split's images with its truth and what was found above the threshold."""

    def __init__(
        self, dataset_folder: Path, split: str, categories: list[dict[str, Any]], evaluation: Path, threshold: float,
        max_dets: int,
    ):  # fmt: skip
        self.shards = split_shards(dataset_folder, split)
        self.names = [category["name"] for category in categories]
        self.by_id = {category["id"]: category["name"] for category in categories}
        self.colours = class_colours(self.names)
        self.threshold = threshold
        columns = ["image_id", "file_name", "width", "height", "annotations"]
        self.truth = coco_truth(read_split(Path(dataset_folder), split, columns), categories)
        found = detections_to_coco(pq.read_table(Path(evaluation) / "detections.parquet"), categories)
        keep = found["score"] >= threshold
        found = {key: values[keep] for key, values in found.items()}
        self.matches = match(self.truth, found, max_dets, IOUS[:1])
        self.kind, self.about = kinds_of_errors(self.matches)
        self.found = {
            "image_id": self.matches.images[self.matches.image],
            "category_id": self.matches.categories[self.matches.label],
            "bbox": self.matches.box,
            "score": self.matches.score,
        }

    def spread(self) -> list[int]:
        """SPREAD images evenly over the split, the same for every model; images with objects are preferred."""
        with_objects = {annotation["image_id"] for annotation in self.truth["annotations"]}
        ids = sorted(with_objects) or sorted(image["id"] for image in self.truth["images"])
        at = np.unique(np.linspace(0, len(ids) - 1, min(SPREAD, len(ids))).round().astype(int))
        return [ids[i] for i in at]

    def grids(self) -> dict[str, list[dict[str, Any]]]:
        """The "worst", "best" and "typical" images: [{"id", "quality", "caption"}] each, none in two of them.

        quality is panoptic quality (Kirillov et al. 2019) of one image's boxes: the sum of the IoUs of what was found
        rightly, over the mean of what was found and what is labelled; 0 is all wrong, 1 perfect. The worst are those
        with the most and most confident mistakes, at most half of all; the best have the highest quality, the typical
        lie nearest to its median. Images where nothing is labelled and nothing found are in none.
        """
        annotations, matched = self.truth["annotations"], self.matches.found[0].tolist()
        objects, wrong, ious = defaultdict(list), defaultdict(list), defaultdict(list)
        for at, annotation in enumerate(annotations):
            if not annotation["iscrowd"] and annotation["reject"] is None:
                objects[annotation["image_id"]].append(at)
        counted = {at for here in objects.values() for at in here}
        for at, (image, place) in enumerate(zip(self.found["image_id"].tolist(), matched, strict=True)):
            if place < 0:
                wrong[image].append(at)
            elif place in counted:  # what lies on a crowd is neither right nor wrong
                ious[image].append(self._iou(at, place))
        hit = set(matched)

        scenes = []
        for image in self.truth["images"]:
            here = objects[image["id"]]
            missed = [at for at in here if at not in hit]
            false = sorted(wrong[image["id"]], key=lambda at: -self.found["score"][at])
            right = ious[image["id"]]
            if here or false:
                scenes.append(
                    {"id": image["id"], "quality": 2 * sum(right) / (len(here) + len(right) + len(false)),
                     "badness": len(missed) + float(self.found["score"][false].sum()),
                     "here": here, "missed": missed, "false": false}
                )  # fmt: skip
        middle = np.median([scene["quality"] for scene in scenes]) if scenes else 0.0
        bad = sorted((s for s in scenes if s["badness"]), key=lambda s: (-s["badness"], s["id"]))
        worst = bad[: min(WORST, (len(scenes) + 1) // 2)]
        rest = [scene for scene in scenes if scene not in worst]
        good = sorted((s for s in rest if s["quality"]), key=lambda s: (-s["quality"], -len(s["here"]), s["id"]))
        best = good[: min(BEST, (len(rest) + 1) // 2)]
        rest = [scene for scene in rest if scene not in best]
        typical = sorted(rest, key=lambda s: (abs(s["quality"] - middle), s["id"]))[:TYPICAL]
        return {
            name: [{"id": s["id"], "quality": s["quality"], "caption": self._caption(s)} for s in grid]
            for name, grid in (("worst", worst), ("best", best), ("typical", typical))
        }

    def rows(self, ids: list[int]) -> list[dict[str, Any]]:
        """The shard rows of some images, read alone, in the order of ids."""
        columns = ["image_id", "file_name", "image", "width", "height", "boxes", "labels"]
        source = pyarrow.dataset.dataset(self.shards)
        table = source.to_table(columns, filter=pc.field("image_id").isin(pa.array(ids, pa.int64())))
        rows = {row["image_id"]: row for row in table.to_pylist()}
        return [rows[image] for image in ids]

    def draw(self, row: dict[str, Any]) -> Image.Image:
        """The row's image with truth and detections on it."""
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
        return draw_truth_and_detections(
            image,
            truth,
            [self.names[label] for label in row["labels"]],
            boxes,
            [self.by_id[category] for category in self.found["category_id"][mine].tolist()],
            self.found["score"][mine].tolist(),
            self.colours,
        )

    def attention(self, checkpoint: Path, ids: list[int]) -> list[dict[str, str]]:
        """Where the last decoder layer of a checkpoint looks in some images: [{"name", "caption", "source"}].

        A panel for each of the surest detections: PANELS, two or one. Raises CheckpointError.
        """
        from detr.checkpoint import load_checkpoint
        from detr.explain import explain
        from detr.segmentation import DETRsegm

        network, config = load_checkpoint(checkpoint)
        if isinstance(network, DETRsegm):
            network = network.detr
        pictures = []
        for row in self.rows(ids):
            image = decode_image(row["image"], row["width"] * row["height"])
            found = explain(network, image, self.threshold)
            certain = int((found.scores >= self.threshold).sum())
            number = PANELS if certain >= PANELS else max(1, min(certain, 2))  # a sheet of two columns
            names = [config["categories"][label]["name"] for label in found.labels[:number]]
            sheet = draw_decoder_attention(
                image, found.decoder_attention(number), found.boxes[:number], names, found.scores[:number],
                [self.colours[name] for name in names],
            )  # fmt: skip
            sheet.thumbnail((2 * PICTURE_SIDE, 2 * PICTURE_SIDE))
            if not certain:
                caption = "nothing is sure here; its surest guess"
            elif certain > number:
                caption = f"the {number} surest of {certain} detections"
            else:
                caption = "its one detection" if certain == 1 else f"its {certain} detections"
            pictures.append({"name": row["file_name"], "caption": caption, "source": jpeg(sheet)})
        return pictures

    def _caption(self, scene: dict[str, Any]) -> str:
        words = self._mistakes(scene)
        if not words:
            objects = len(scene["here"])
            return "its one object found" if objects == 1 else f"all {objects} objects found"
        more = len(words) - 3
        return "; ".join(words[:3]) + (f"; and {more} more" if more > 0 else "")

    def _iou(self, detection: int, annotation: int) -> float:
        """Of a detection and an annotation."""
        return float(overlaps(self.matches.box[[detection]], self.matches.object_box[[annotation]])[0, 0])

    def _mistakes(self, scene: dict[str, Any]) -> list[str]:
        """What went wrong in one image by `kinds_of_errors`, the gravest first."""
        here, missed, false = scene["here"], scene["missed"], scene["false"]
        if here and not (self.found["image_id"] == scene["id"]).any():
            there = "is 1 object" if len(here) == 1 else f"are {len(here)} objects"
            return [f"found nothing here, where there {there}"]
        annotations = self.truth["annotations"]
        words, taken = [], set(self.about[false].tolist())
        for at in false:
            name, score, about = self.by_id[int(self.found["category_id"][at])], self.found["score"][at], self.about[at]
            kind = KINDS[self.kind[at]]
            if kind == WRONG_CLASS:
                there = self.by_id[annotations[about]["category_id"]]
                words.append(f"‘{name}’ found at {score:.2f} where there is a ‘{there}’")
            elif kind == DUPLICATE:
                words.append(f"‘{name}’ found a second time at {score:.2f}")
            elif kind == POOR_BOX:
                words.append(f"‘{name}’ found at {score:.2f}, but out of place (IoU {self._iou(at, about):.2f})")
            elif kind == BACKGROUND:
                words.append(f"‘{name}’ found at {score:.2f} where nothing is labelled")
            else:
                words.append(f"‘{name}’ found at {score:.2f}, near something else")
        total = Counter(self.by_id[annotations[at]["category_id"]] for at in here)
        lost = Counter(self.by_id[annotations[at]["category_id"]] for at in missed if at not in taken)
        misses = [
            f"missed ‘{name}’" if total[name] == 1 else f"missed {count} of {total[name]} ‘{name}’"
            for name, count in lost.most_common()
        ]
        return misses[:1] + words + misses[1:]


def jpeg(image: Image.Image) -> str:
    """The image as a source in the page itself."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()

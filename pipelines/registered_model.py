"""The registered model's code: MLflow runs this file to load a version, so nothing is unpickled.

    model = mlflow.pyfunc.load_model("models:/digits@champion")
    model.predict(pandas.DataFrame({"image": [open("a.jpg", "rb").read()]}), params={"score_threshold": 0.5})

Input: a row per image, with its encoded bytes in column `image` (base64 over HTTP) or its place on this
machine in column `path`. Output: a row per image with `boxes` (xyxy in pixels of the image as stored),
`scores`, `category_ids` and `category_names`, best first, and `status`: "ok", or why the image could not
be read.
"""

from __future__ import annotations

from pathlib import Path

import mlflow
import pandas

MAX_PIXELS = 100_000_000  # checked before decoding


class DetectionModel(mlflow.pyfunc.PythonModel):
    def load_context(self, context) -> None:
        from pipelines.detect import Detector

        self.detector = Detector.load(context.artifacts["checkpoint"])

    def predict(self, context, model_input: pandas.DataFrame, params: dict | None = None) -> pandas.DataFrame:
        from detr.transforms import ImageError, decode_image

        threshold = (params or {}).get("score_threshold")
        if threshold is None or threshold < 0:
            threshold = self.detector.score_threshold
        categories = self.detector.categories
        rows, images, places = [], [], []
        for number, record in enumerate(model_input.to_dict("records")):
            row = {"boxes": [], "scores": [], "category_ids": [], "category_names": [], "status": "ok"}
            rows.append(row)
            try:
                images.append(decode_image(_encoded(record), MAX_PIXELS))
                places.append(number)
            except (ImageError, OSError) as error:
                row["status"] = str(error)
        for number, found in zip(places, self.detector.detect(images) if images else [], strict=True):
            keep = found["scores"] >= threshold
            labels = found["labels"][keep].tolist()
            rows[number] |= {
                "boxes": found["boxes"][keep].tolist(),
                "scores": found["scores"][keep].tolist(),
                "category_ids": [categories[label]["id"] for label in labels],
                "category_names": [categories[label]["name"] for label in labels],
            }
        return pandas.DataFrame(rows)


def _encoded(record: dict) -> bytes:
    """The image's bytes, from whichever column holds it."""
    image, path = record.get("image"), record.get("path")
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(path, str):
        return Path(path).read_bytes()
    raise OSError("neither column image nor column path holds an image")


mlflow.models.set_model(DetectionModel())

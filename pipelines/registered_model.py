"""The registered model's code: MLflow runs this file to load a version, so nothing is unpickled.

    model = mlflow.pyfunc.load_model("models:/digits@champion")
    model.predict(pandas.DataFrame({"image": [open("a.jpg", "rb").read()]}), params={"score_threshold": 0.5})

Input: a row per image, with its encoded bytes in column `image` (base64 over HTTP) or its place on this
machine in column `path`. Output: a row per image with `boxes` (xyxy in pixels of the image as stored),
`scores`, `category_ids` and `category_names`, best first, and `status`: "ok", or why the image could not
be read. Without score_threshold the model's own thresholds hold, of each class where it has them.
"""

from __future__ import annotations

from pathlib import Path

import mlflow
import pandas
from mlflow.exceptions import MlflowException

MAX_PIXELS = 100_000_000  # checked before decoding


class DetectionModel(mlflow.pyfunc.PythonModel):
    def load_context(self, context) -> None:
        from pipelines.detect import Detector

        self.detector = Detector.load(context.artifacts["checkpoint"])

    def predict(self, context, model_input: pandas.DataFrame, params: dict | None = None) -> pandas.DataFrame:
        from detr.transforms import ImageError, decode_image
        from pipelines.detect import label_thresholds

        if not {"image", "path"} & set(model_input.columns):  # MLflow drops columns of other names
            raise MlflowException.invalid_parameter_value(
                "Give a row per image, with its encoded bytes in a column `image` (base64 over HTTP), or its file's "
                "name in a column `path`."
            )
        asked = (params or {}).get("score_threshold")
        own = asked is None or asked < 0
        least = self.detector.thresholds if own else label_thresholds(self.detector.categories, asked)
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
        for number, found in zip(places, self.detector.detect(images, least), strict=True):
            labels = found["labels"].tolist()
            rows[number] |= {
                "boxes": found["boxes"].tolist(),
                "scores": found["scores"].tolist(),
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
        if not Path(path).is_file():  # a device or a pipe may never end
            raise OSError(f"there is no file {path}")
        return Path(path).read_bytes()
    raise OSError("neither column image nor column path holds an image")


mlflow.models.set_model(DetectionModel())

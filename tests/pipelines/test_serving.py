"""The registered model, loaded and served where nothing of this repository can be imported."""
from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr.checkpoint import save_checkpoint
from detr.config import ModelConfig
from detr.model import DETR
from pipelines import registry
from pipelines.detect import Detector
from pipelines.registry import download, register
from pipelines.settings import load_settings
from pipelines.stage import read_json, write_json
from pipelines.tracking import tracker

SETTINGS = load_settings()
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
ALL = {"score_threshold": 0.0}


class Model:
    """A registered model with thresholds of its classes, images, and what the checkpoint that was registered finds."""

    def __init__(self, folder: Path):
        self.folder = folder
        torch.manual_seed(0)
        small = {"preset": "tiny", "hidden_dim": 32, "enc_layers": 1, "dec_layers": 1, "num_queries": 5}
        config = ModelConfig.model_validate({**small, "dim_feedforward": 32, "image_size": 64, "num_classes": 2})
        checkpoint = folder / "checkpoint"
        save_checkpoint(checkpoint, DETR(config), CATEGORIES)
        noise = np.random.default_rng(0).integers(0, 255, (3, 40, 60, 3), dtype=np.uint8)
        self.images = [Image.fromarray(pixels) for pixels in noise]
        self.encoded = []
        for number, image in enumerate(self.images):
            stream = io.BytesIO()
            image.save(stream, "PNG")
            self.encoded.append(stream.getvalue())
            (folder / f"{number}.png").write_bytes(stream.getvalue())
        # Random weights find all with like scores: half of one class is above its threshold, and all of the other.
        found = Detector.load(checkpoint).detect(self.images)
        cats = np.concatenate([one["scores"][one["labels"] == 0] for one in found])
        thresholds = {"3": float(np.median(cats)), "7": 0.0}
        values = read_json(checkpoint / "config.json")
        write_json(checkpoint / "config.json", {**values, "score_threshold": 1.0, "score_thresholds": thresholds})
        self.tracked = tracker(SETTINGS, folder / "store", "digits")
        run_id = self.tracked.start_run("train")
        evaluation = {"AP": 0.3, "split": "val", "split_digest": "val-1"}
        register(SETTINGS, self.tracked, run_id, checkpoint, evaluation, "data", "digits")
        source = self.tracked.client().get_model_version("digits", "1").source
        self.package = Path(source.removeprefix("file://"))

    def expected(self, images=None) -> list[dict]:
        """Rows as the model gives them with score_threshold 0, found in this process."""
        place, _, _ = download(self.tracked, "models:/digits/1", self.folder / "got")
        rows = []
        for found in Detector.load(place).detect(self.images if images is None else images):
            categories = [CATEGORIES[label] for label in found["labels"]]
            rows.append({
                "boxes": found["boxes"].tolist(), "scores": found["scores"].tolist(), "status": "ok",
                "category_ids": [category["id"] for category in categories],
                "category_names": [category["name"] for category in categories],
            })  # fmt: skip
        return rows

    def above_own_thresholds(self, rows: list[dict]) -> list[dict]:
        config = read_json(self.package / "artifacts" / "checkpoint" / "config.json")
        own = config["score_thresholds"]
        kept = []
        for row in rows:
            scores, ids = row["scores"], row["category_ids"]
            of_class = [own.get(str(i), config["score_threshold"]) for i in ids]
            keep = [k for k, least in enumerate(of_class) if scores[k] >= np.float32(least)]
            kept.append({key: [value[k] for k in keep] if key != "status" else value for key, value in row.items()})
        return kept


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return Model(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory) -> Path:
    """A virtual environment's Python that has every package of this one, and not this repository."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    # As a line of a .pth file the packages can be imported, but .pth files among them, such as ours, do nothing.
    inner = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True,
        text=True,
    ).stdout.strip()  # fmt: skip
    (Path(inner) / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    uvicorn = folder / "bin" / "uvicorn"  # `mlflow models serve` looks for it in the path
    uvicorn.write_text(f"#!{python}\nfrom uvicorn.main import main\n\nmain()\n")
    uvicorn.chmod(0o755)
    return python


def environment(python: Path, model: Model) -> dict[str, str]:
    given = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return given | {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": model.tracked.uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


LOADED = """
import importlib.util, json, sys
assert importlib.util.find_spec("pipelines") is None and importlib.util.find_spec("detr") is None
import mlflow, pandas
model = mlflow.pyfunc.load_model("models:/digits/1")
files = sys.argv[1:]
data = [open(file, "rb").read() for file in files]
ask = lambda column, values, **params: model.predict(pandas.DataFrame({column: values}), **params).to_dict("records")
all = {"params": {"score_threshold": 0.0}}
answers = [ask("image", data), ask("image", data, **all), ask("path", files, **all), ask("image", [*data, b"broken"])]
import pipelines, detr
json.dump([answers, pipelines.__file__, detr.__file__], sys.stdout)
"""


def check_loaded(python: Path, model: Model, folder: Path) -> None:
    files = [str(model.folder / f"{number}.png") for number in range(len(model.images))]
    done = subprocess.run(
        [python, "-c", LOADED, *files], capture_output=True, text=True, cwd=folder, timeout=300,
        env=environment(python, model),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (own, by_bytes, by_path, with_broken), *code = json.loads(done.stdout)
    assert all(file.startswith(str(model.package)) for file in code)
    same(by_bytes, model.expected())
    same(own, model.above_own_thresholds(model.expected()))
    assert by_path == by_bytes and with_broken[:-1] == own
    assert with_broken[-1]["boxes"] == [] and "not an image" in with_broken[-1]["status"]


@contextmanager
def served(python: Path, model: Model, folder: Path):
    """`mlflow models serve` with that Python; gives post(body) -> (HTTP status, answer)."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "mlflow", "models", "serve", "-m", "models:/digits/1", "--env-manager", "local",
               "-h", "127.0.0.1", "-p", str(port)]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment(python, model),
            start_new_session=True,
        )  # fmt: skip

    def post(body: dict | bytes) -> tuple[int, dict]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        address = f"http://127.0.0.1:{port}/invocations"
        try:
            request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
        yield post
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def post(clean_python, model, tmp_path_factory):
    with served(clean_python, model, tmp_path_factory.mktemp("served")) as post:
        yield post


def records(*images: bytes, **more) -> dict:
    return {"dataframe_records": [{"image": base64.b64encode(image).decode()} for image in images], **more}


def same(rows: list[dict], expected: list[dict]) -> None:
    """Equal to 1e-5: scores, and boxes as shares of the image."""
    assert len(rows) == len(expected)
    for row, want in zip(rows, expected, strict=True):
        assert {key: row[key] for key in ("category_ids", "category_names", "status")} == {
            key: want[key] for key in ("category_ids", "category_names", "status")
        }
        np.testing.assert_allclose(row["scores"], want["scores"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(row["boxes"], want["boxes"], rtol=0, atol=1e-5 * 60)


def test_the_models_folder_holds_all_it_needs_and_nothing_of_this_machine(model):
    text = (model.package / "MLmodel").read_text()
    assert str(model.folder / "checkpoint") not in text and str(Path(registry.__file__).parent) not in text
    assert "/detr-model-" not in text  # the temporary folder it was packed in
    pickled = (".pkl", ".pickle", ".pt", ".pth", ".pyc")
    assert not [path for path in model.package.rglob("*") if path.suffix in pickled]
    assert "mlflow==" in (model.package / "requirements.txt").read_text()


def test_it_detects_as_in_training_where_this_repository_is_not(model, clean_python, tmp_path):
    check_loaded(clean_python, model, tmp_path)


def test_it_detects_as_in_training_over_http(model, post):
    code, answer = post(records(*model.encoded, params=ALL))
    assert code == 200
    same(answer["predictions"], model.expected())
    own = model.above_own_thresholds(model.expected())
    same(post(records(*model.encoded))[1]["predictions"], own)
    kept, of_all = (sum(len(row["scores"]) for row in rows) for rows in (own, model.expected()))
    assert 0 < kept < of_all
    split = {"columns": ["path"], "data": [[str(model.folder / "0.png")]]}
    same(post({"dataframe_split": split, "params": ALL})[1]["predictions"], model.expected(model.images[:1]))
    [nothing] = post(records(model.encoded[0], params={"score_threshold": 1.0}))[1]["predictions"]
    assert nothing["boxes"] == [] and nothing["status"] == "ok"


def huge_image() -> bytes:
    """A few bytes that say they are 20000 x 20000 pixels."""
    stream = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    return stream.getvalue()


def test_one_bad_image_of_many_has_its_reason_as_status(model, post):
    bad = [b"hello", b"", model.encoded[0][:200], huge_image()]
    code, answer = post(records(model.encoded[0], *bad, params=ALL))
    assert code == 200
    good, *rest = answer["predictions"]
    same([good], model.expected(model.images[:1]))
    for row, words in zip(rest, ["not an image", "empty", "cannot be decoded", "limit of 100000000"], strict=True):
        assert words in row["status"] and row["boxes"] == row["scores"] == row["category_ids"] == []


@pytest.mark.parametrize("file", ["/nowhere/a.png", "/dev/zero", "/", "a\0b"])
def test_a_path_that_is_no_file_has_its_reason_as_status(post, file):
    code, answer = post({"dataframe_records": [{"path": file}]})
    assert code == 200 and answer["predictions"][0]["status"] == f"there is no file {file}"


@pytest.mark.parametrize(
    "body, words",
    [
        ({"dataframe_records": [{"picture": "x"}]}, "column `image`"),
        ({"inputs": [[1, 2]]}, "column `image`"),
        ({"dataframe_records": []}, "column `image`"),
        ({"dataframe_records": [{"image": None}]}, "column image"),
        (records(b"x", params={"score_threshold": "high"}), "score_threshold"),
        ({}, "dataframe_records"),
        (b"{", "valid JSON"),
    ],
)
def test_a_request_without_images_is_refused_with_a_reason(post, body, words):
    code, answer = post(body)
    assert code == 400 and words in answer["message"]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_it_detects_as_in_training_in_an_environment_of_its_own_requirements(model, tmp_path):
    """Nothing but what pip makes of the requirements.txt in the model's folder."""
    venv.create(tmp_path / "environment", with_pip=True)
    python = tmp_path / "environment" / "bin" / "python"
    requirements = model.package / "requirements.txt"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", requirements], check=True)
    check_loaded(python, model, tmp_path)
    (tmp_path / "served").mkdir()
    with served(python, model, tmp_path / "served") as post:
        same(post(records(*model.encoded, params=ALL))[1]["predictions"], model.expected())

"""The commands as a user types them: help, exit codes, one sentence for what is wrong."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from ray.exceptions import AuthenticationError

from jobs.cli import COMMANDS, main
from jobs.common import job, ray_session
from pipelines.settings import RunSettings, UserError, load_settings

HEAVY = ("torch", "ray", "mlflow", "sklearn", "pyarrow", "pandas", "matplotlib", "dbos", "pydantic")


def detr(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def sentence(result) -> str:
    """The error, which must be one sentence and no traceback."""
    text = result.stderr.strip()
    assert "Traceback" not in text and len(text.splitlines()) == 1, text
    return text


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_help_has_an_example_and_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom jobs.cli import main\n"
        f"try: main({[*arguments, '--help']!r})\nexcept SystemExit as e: assert e.code == 0\n"
        f"heavy = set({HEAVY!r}) & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Example: detr" in done.stdout


def test_a_module_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "jobs.train", "--help"], capture_output=True, text=True, check=True)
    assert "Example: detr train" in done.stdout


def test_print_settings_prints_what_the_run_resolves_to():
    shown = yaml.safe_load(detr("train", "--print-settings", "train.lr=2e-4").stdout)
    assert shown["train"]["lr"] == 2e-4 and shown["model"]["queries"] == "anchors"
    assert json.loads(detr("train", "--print-settings", "--json", "seed=3").stdout)["seed"] == 3


def test_what_print_settings_prints_says_what_each_means_and_is_taken_by_config(tmp_path):
    printed = detr("train", "--print-settings", "model=small", "train.freeze=[backbone]").stdout
    assert "  # Learning rate of all but the backbone, at its highest.\n  lr: 0.002\n" in printed
    (tmp_path / "run.yaml").write_text(printed, encoding="utf-8")
    assert detr("train", "--config", str(tmp_path / "run.yaml"), "--print-settings").stdout == printed


def test_unknown_commands_and_options_are_wrong_use():
    assert detr("fly").exit_code == 2
    assert detr("train", "--fast").exit_code == 2


@pytest.fixture
def coco(tmp_path):
    """A small COCO folder; tests spoil it."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 32, "height": 32}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    for split in ("train", "val"):
        (tmp_path / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path, content


@pytest.mark.parametrize("command", ["ingest", "data", "train", "sweep", "pipeline"])
def test_a_missing_folder_is_said_before_any_long_work(command, tmp_path):
    result = detr(command, "--store", str(tmp_path / "store"), f"data.path={tmp_path / 'nowhere'}")
    assert result.exit_code == 2
    assert "nowhere" in sentence(result)


def test_a_misspelt_key_names_the_right_one(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {bugdet: 3 epochs}\n")
    result = detr("train", "--config", str(file))
    assert result.exit_code == 2
    assert "train.bugdet" in sentence(result) and "train.budget" in sentence(result)


def test_an_annotation_file_that_is_not_coco(coco):
    folder, _ = coco
    (folder / "instances_train.json").write_text('{"hello": 1}')
    result = detr("train", "--store", str(folder / "store"), f"data.path={folder}")
    assert result.exit_code == 2
    assert "instances_train.json" in sentence(result)


def test_no_usable_box(coco):
    folder, content = coco
    (folder / "instances_train.json").write_text(json.dumps({**content, "annotations": []}))
    result = detr("train", "--store", str(folder / "store"), f"data.path={folder}")
    assert result.exit_code == 2
    assert "instances_train.json" in sentence(result)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../b.png"])
def test_image_names_that_leave_their_folder(coco, name):
    folder, content = coco
    content["images"][0]["file_name"] = name
    (folder / "instances_train.json").write_text(json.dumps(content))
    result = detr("pipeline", "--store", str(folder / "store"), f"data.path={folder}")
    assert result.exit_code == 2
    assert name in sentence(result)
    listed = folder / "list.txt"
    listed.write_text(f"images/a.png\n{name}\n")
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text('{"score_threshold": 0.5, "categories": [], "model": {}}')
    (model / "model.safetensors").write_bytes(b"weights")
    result = detr("predict", "--store", str(folder / "store"), "--input", str(listed), "--model", str(model))
    assert result.exit_code == 2
    assert name in sentence(result)


def test_predict_without_model_or_input(tmp_path):
    store = str(tmp_path / "store")
    assert detr("predict", "--store", store).exit_code == 2
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    result = detr("predict", "--store", store, str(tmp_path / "a.png"), "--show")
    assert result.exit_code == 2
    assert "--model" in sentence(result)


@pytest.mark.parametrize("place", ["s3://bucket/photos/dt=2024-01-01", "s3://bucket/a.b=c/d", "photos/dt=1", "./dt=1",
                                   "file:///photos/dt=1"])  # fmt: skip
def test_a_place_with_an_equals_sign_is_an_input(place, tmp_path):
    @job("detr test", takes_input=True)
    def command(settings, store, inputs):
        return {"inputs": inputs, "lr": settings.train.lr, "path": settings.data.path}

    words = [place, "train.lr=0.25", "data.path=s3://bucket/dt=1"]
    result = CliRunner().invoke(command, ["--json", "--store", str(tmp_path), *words])
    assert json.loads(result.stdout) == {
        "exit_code": 0, "inputs": [place], "lr": 0.25, "path": "s3://bucket/dt=1"
    }  # fmt: skip


def test_ray_has_the_cpus_that_a_container_leaves(monkeypatch):
    """Not those of the machine."""
    options = {}

    def init(**given):
        options.update(given)
        raise ConnectionError("no")

    monkeypatch.setattr("os.environ", dict(os.environ))
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("joblib.cpu_count", lambda: 40)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(UserError, match="no Ray cluster"), ray_session(RunSettings()):
        pass
    assert options["num_cpus"] == 40


@pytest.mark.parametrize(
    ("raised", "word"),
    [
        (ConnectionError("Failed to connect"), "no Ray cluster at auto (Failed to connect)"),
        (AuthenticationError("The file is empty. Note: much more"), "not here: The file is empty"),
        (RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0"), "started with: Ray: 2.59.0"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_sentence(raised, word, monkeypatch):
    def init(**given):
        raise raised

    monkeypatch.setattr("os.environ", dict(os.environ))
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(UserError) as said, ray_session(load_settings(None, ["cluster.address=auto"])):
        pass
    assert word in str(said.value) and "\n" not in str(said.value)


def test_errors_are_json_where_json_was_asked_for(tmp_path):
    result = detr("ingest", "--json", f"data.path={tmp_path / 'nowhere'}")
    said = json.loads(result.stdout)
    assert said["exit_code"] == result.exit_code == 2 and "nowhere" in said["error"]


@pytest.mark.parametrize("as_json", [False, True])
def test_what_mlflow_cannot_do_is_one_sentence(tmp_path, as_json):
    class Failing(BaseHTTPRequestHandler):
        def do_GET(self):
            said = {"error_code": "INTERNAL_ERROR", "message": "the disk is full\nTraceback: line 1\nline 2"}
            self.send_response(400)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        do_POST = do_GET

        def log_message(self, *said):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = detr("history", "--store", str(tmp_path), "--model", "digits", *(["--json"] if as_json else []),
                      f"tracking.uri=http://127.0.0.1:{server.server_port}")  # fmt: skip
        server.shutdown()
    assert result.exit_code == 1
    assert sentence(result) == "MLflow failed: INTERNAL_ERROR: the disk is full"
    if as_json:
        assert json.loads(result.stdout) == {"exit_code": 1, "error": sentence(result)}


def test_a_fault_of_ours_is_no_sentence_of_mlflows(tmp_path):
    @job("detr broken")
    def broken(settings, store):
        import mlflow.exceptions  # noqa: F401

        raise ValueError("a fault")

    result = CliRunner().invoke(broken, ["--store", str(tmp_path)])
    assert isinstance(result.exception, ValueError) and "MLflow failed" not in result.stderr


@pytest.mark.parametrize("ap, words", [(None, "(no ground truth on val)"), (0.0, "(AP 0.000 on val)")])
def test_register_does_not_call_a_split_without_ground_truth_a_zero(monkeypatch, ap, words):
    import pipelines.workflow

    monkeypatch.setattr("jobs.register.ray_session", lambda settings: contextlib.nullcontext())
    monkeypatch.setattr("jobs.register.find_checkpoint", lambda *given: lambda data: ("mine", "the-run"))
    monkeypatch.setattr(pipelines.workflow, "find_data", lambda *given: lambda: {})
    for name, result in (("evaluate", {"AP": ap}), ("register", {"uri": "models:/cats/1"})):
        monkeypatch.setattr(pipelines.workflow, f"{name}_stage", lambda *given, r=result: {"result": r})
    assert detr("register").stdout == f"models:/cats/1 {words}\n"


def test_sample_writes_a_coco_folder(tmp_path):
    result = detr("sample", "--json", "--output", str(tmp_path / "digits"), "sample.train=6", "sample.val=2",
                  "sample.test=0")  # fmt: skip
    assert result.exit_code == 0
    assert json.loads(result.stdout)["images"] == {"train": 6, "val": 2}
    assert len(list((tmp_path / "digits" / "images").iterdir())) == 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model of two classes that has learnt nothing."""
    import torch

    from detr.checkpoint import save_checkpoint
    from detr.config import ModelConfig
    from detr.model import DETR

    torch.manual_seed(0)
    config = ModelConfig(preset="tiny", hidden_dim=32, nheads=4, enc_layers=1, dec_layers=1, dim_feedforward=64,
                         num_queries=6, num_classes=2)  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, DETR(config), [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}])
    return folder


def explained(checkpoint, tmp_path, *more: str):
    Image.effect_noise((64, 48), 80).convert("RGB").save(tmp_path / "photo.jpg")
    return detr("explain", "--store", str(tmp_path / "store"), "--model", str(checkpoint),
                "--output", str(tmp_path / "pictures"), str(tmp_path / "photo.jpg"), *more)  # fmt: skip


def test_explain_writes_its_pictures(checkpoint, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        Image.new("RGB", (40 + 8 * number, 40)).save(images / f"{number}.png")
    (images / "bad.png").write_bytes(b"not an image")
    result = explained(checkpoint, tmp_path, "--json", "--points", "3,4 60.5,40", "--dataset", str(images),
                       "predict.score_threshold=0")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert sorted(d["query"] for d in said["detections"]) == list(range(6))
    assert {d["name"] for d in said["detections"]} <= {"cat", "dog"}
    assert said["dataset_images"] == 4 and said["rejects"] == {"it is not an image of a known format": 1}
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "pictures").iterdir()}
    assert set(said["pictures"]) == set(sizes)
    assert sizes["detections.jpg"] == (480, 360)
    assert sizes["encoder_attention.png"] == (3 * 488 - 8, 360)  # the image and a panel for each point
    assert sizes["decoder_attention.png"] == (3 * 488 - 8, 2 * 368 - 8)  # six queries
    assert "queries.png" in sizes


def test_explain_says_when_nothing_was_found(checkpoint, tmp_path):
    result = explained(checkpoint, tmp_path, "predict.score_threshold=1")
    assert result.exit_code == 0
    assert result.stdout.startswith("Nothing found") and "queries.png" not in result.stdout
    assert Image.open(tmp_path / "pictures" / "encoder_attention.png").width == 2 * 488 - 8


def test_predict_and_explain_apply_and_report_the_same_thresholds(checkpoint, tmp_path):
    """Of two classes one is never to be shown: its own threshold is 1, while the overall one is 0."""
    model = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    of_classes = {"3": 1.0}
    (model / "config.json").write_text(json.dumps({**config, "score_threshold": 0.0, "score_thresholds": of_classes}))
    Image.effect_noise((64, 48), 80).convert("RGB").save(tmp_path / "photo.jpg")
    common = ("--json", "--store", str(tmp_path / "store"), "--model", str(model), str(tmp_path / "photo.jpg"))

    def said(command, *more):
        result = detr(*command, "--output", str(tmp_path / f"{command[0]}.png"), *common, *more)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    for command in (["predict", "--show"], ["explain"]):
        found = said(command)
        assert found["score_threshold"] == 0.0 and found["score_thresholds"] == of_classes
        assert {d["name"] for d in found["detections"]} == {"dog"}
        assert said(command, "predict.score_threshold=0.01")["score_thresholds"] == {}


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--points", "3;4"], "3;4"),
        (["--points", "64,4"], "64x48"),
        (["--points", "1,1", "2,2"], "quotes"),
        (["--dataset", "nowhere"], "nowhere"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_explain_refuses_what_it_cannot_use(checkpoint, tmp_path, more, word):
    result = explained(checkpoint, tmp_path, *more)
    assert result.exit_code == 2
    assert word in sentence(result)
    assert not (tmp_path / "pictures").exists()


def test_explain_has_a_limit_of_pixels_and_reads_images_only(checkpoint, tmp_path):
    result = explained(checkpoint, tmp_path, "predict.max_pixels=3071")
    assert result.exit_code == 2 and "3071" in sentence(result)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    result = explained(checkpoint, tmp_path, "--dataset", str(bad))
    assert result.exit_code == 2 and "known format" in result.stderr


def test_the_command_that_shows_the_runs_can_be_typed_as_it_stands(tmp_path, monkeypatch):
    from jobs.pipeline import _place_of_runs

    shown = " ui --backend-store-uri sqlite:///store/mlflow.db"
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    assert _place_of_runs(None, Path("store")) == f"mlflow{shown}"  # it is elsewhere
    (programs / "mlflow").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    assert _place_of_runs(None, Path("store")) == f".venv/bin/mlflow{shown}"
    (tmp_path / "my work").mkdir()
    monkeypatch.chdir(tmp_path / "my work")
    assert _place_of_runs(None, Path("store")) == f"{programs}/mlflow{shown}"
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")  # as an activated environment has it
    assert _place_of_runs(None, Path("store")) == f"mlflow{shown}"
    assert _place_of_runs("https://mlflow.example.org", Path("store")) == "https://mlflow.example.org"


def test_what_others_print_does_not_get_into_the_result(tmp_path):
    @job("noisy")
    def noisy(settings, store):
        """Prints beside its result, as Ray does now and then."""
        print("a warning of the raylet")
        return {"answer": 42}

    result = CliRunner().invoke(noisy, ["--json", "--store", str(tmp_path)])
    assert json.loads(result.stdout) == {"exit_code": 0, "answer": 42}
    assert "a warning of the raylet" in result.stderr


def test_what_is_drawn_for_people_is_not_in_the_json_but_for_who_follows_the_job(tmp_path, monkeypatch):
    @job("drawn")
    def drawn(settings, store):
        """Has a table."""
        return {"rows": [1], "page": "┏━┓"}

    ask = ["--json", "--store", str(tmp_path)]
    assert CliRunner().invoke(drawn, ask[1:]).stdout == "┏━┓\n"
    assert json.loads(CliRunner().invoke(drawn, ask).stdout) == {"exit_code": 0, "rows": [1]}
    monkeypatch.setenv("DETR_JOB", "detr-drawn-1")
    assert json.loads(CliRunner().invoke(drawn, ask).stdout) == {"exit_code": 0, "rows": [1], "page": "┏━┓"}


def test_a_damaged_model_is_one_sentence_for_predict_show(checkpoint, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    (damaged / "config.json").write_text("{")
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    result = detr("predict", "--store", str(tmp_path / "store"), "--model", str(damaged), "--show",
                  str(tmp_path / "photo.png"))  # fmt: skip
    assert result.exit_code == 2 and "damaged" in sentence(result)


def test_the_guides_python_draws_attention_without_ray(checkpoint, tmp_path):
    Image.effect_noise((320, 240), 80).save(tmp_path / "photo.jpg")
    guide = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", guide, re.S) if "detr.explain" in c)
    code = code.replace("path/to/checkpoint", str(checkpoint))
    for name in ("photo.jpg", "encoder.png", "decoder.png"):
        code = code.replace(name, str(tmp_path / name))
    code += "\nimport sys\nassert not {'ray', 'mlflow', 'dbos', 'matplotlib.pyplot'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "encoder.png").size == (3 * 488 - 8, 360)
    assert (tmp_path / "decoder.png").is_file()


def export_to(folder, checkpoint, *more: str):
    return detr("export", "--store", str(folder / "store"), "--model", str(checkpoint),
                "--output", str(folder / "export"), *more)  # fmt: skip


@pytest.fixture
def untraced(monkeypatch):
    """Tracing takes seconds: the exported file is the model itself here, off by what the test appends."""
    from detr import export

    models, off = [], [0.0]

    def run(images, mask):
        found = models[-1](images, mask)
        return [found[key] + off[-1] for key in export.OUTPUTS]

    monkeypatch.setattr(export, "export", models.append)
    monkeypatch.setattr(export, "save", lambda program, path: path.write_text("new"))
    monkeypatch.setattr(export, "load", lambda path: run)
    return off


def test_export_writes_the_file_and_how_far_it_is_off(checkpoint, tmp_path):
    result = export_to(tmp_path, checkpoint, "--json", "--format", "torch")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "export"
    assert {p.name for p in folder.iterdir()} == {"model.pt2", "config.json", "export.json"}
    assert json.loads((folder / "config.json").read_text()) == json.loads((checkpoint / "config.json").read_text())
    record = json.loads((folder / "export.json").read_text())
    weights = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert record["format"] == 1 and record["weights_sha256"] == weights
    found = record["differences"]["model.pt2"]
    assert found["pred_logits"] <= 2e-4 and found["pred_boxes"] <= 2e-5
    assert {batch for batch, *_ in record["checked_shapes"]} == {1, 3}
    assert set(record["versions"]) >= {"torch", "onnx", "onnxruntime"}


def test_an_export_that_differs_is_refused(checkpoint, tmp_path, untraced):
    untraced.append(1e-4)
    result = export_to(tmp_path, checkpoint)
    assert result.exit_code == 1
    said = sentence(result)
    assert "model.pt2" in said and "pred_boxes" in said and "0.0001" in said  # 1e-4 is allowed in the logits
    differences = json.loads((tmp_path / "export" / "export.json").read_text())["differences"]
    assert set(differences) == {"model.pt2", "model.onnx"}
    assert differences["model.pt2"]["pred_boxes"] == pytest.approx(1e-4, rel=1e-2)
    untraced.append(float("nan"))
    assert export_to(tmp_path, checkpoint).exit_code == 1


@pytest.mark.parametrize(("form", "kept"), [("torch", "model.pt2"), ("onnx", "model.onnx")])
def test_no_file_of_an_earlier_export_stays(checkpoint, tmp_path, untraced, form, kept):
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("model.pt2", "model.onnx", "export.json", "notes.txt"):
        (folder / name).write_text("old")
    assert export_to(tmp_path, checkpoint, "--format", form).exit_code == 0
    assert {p.name for p in folder.iterdir()} == {kept, "export.json", "config.json", "notes.txt"}
    assert (folder / kept).read_text() == "new"
    assert set(json.loads((folder / "export.json").read_text())["differences"]) == {kept}


def test_export_says_that_masks_are_left_out(tmp_path, untraced):
    from detr.checkpoint import save_checkpoint
    from detr.config import ModelConfig
    from detr.segmentation import build_model

    config = ModelConfig(backbone="small", norm="batch", hidden_dim=128, enc_layers=0, dec_layers=1,
                         dim_feedforward=16, num_queries=4, num_classes=1, masks=True)  # fmt: skip
    save_checkpoint(tmp_path / "masks", build_model(config), [{"id": 1, "name": "thing"}])
    result = export_to(tmp_path, tmp_path / "masks", "--format", "torch")
    assert result.exit_code == 0, result.output
    assert "masks are not exported" in result.stdout.splitlines()[-1]
    assert json.loads((tmp_path / "export" / "export.json").read_text())["outputs"] == ["pred_logits", "pred_boxes"]


def test_export_into_a_file_or_without_a_model(checkpoint, tmp_path):
    assert export_to(tmp_path, tmp_path / "nowhere").exit_code == 2
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    (damaged / "config.json").write_text("{")
    result = export_to(tmp_path, damaged)
    assert result.exit_code == 2 and "is damaged" in sentence(result)
    (tmp_path / "export").write_text("")
    result = export_to(tmp_path, checkpoint)
    assert result.exit_code == 2 and "is a file" in sentence(result)


def test_a_store_that_is_a_file_is_said_at_once(tmp_path):
    (tmp_path / "store").touch()
    for command in ("ingest", "pipeline", "lineage"):
        result = detr(command, "--store", str(tmp_path / "store"))
        assert result.exit_code == 2 and "is a file; give a folder" in sentence(result)


def test_a_misspelt_command_is_told_the_nearest_one():
    result = detr("tran", "model=tiny")
    assert result.exit_code == 2 and "There is no command 'tran'; did you mean 'train'?" in result.stderr
    result = detr("xyzzy")
    assert result.exit_code == 2 and "xyzzy" in result.stderr and "mean" not in result.stderr


@pytest.mark.parametrize("command", ["evaluate", "register"])
def test_where_nothing_was_trained_no_image_is_read(tmp_path, command):
    result = detr(command, "--store", str(tmp_path / "store"))
    assert result.exit_code == 2 and "Nothing has been trained in this store yet" in sentence(result)
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize("command", ["train", "sweep", "pipeline", "register", "promote", "report"])
def test_runs_that_cannot_be_kept_are_said_before_an_image_is_read(tmp_path, command):
    result = detr(command, "--store", str(tmp_path / "store"), "tracking.uri=http://127.0.0.1:9")
    assert result.exit_code == 1 and "No MLflow server answers at http://127.0.0.1:9" in sentence(result)
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize("words", [
    ["train", "train.init_from=nowhere"], ["pipeline", "train.backbone_weights=nowhere.pth"],
    ["evaluate", "--checkpoint", "nowhere"], ["evaluate", "--checkpoint", ".", "--against", "nowhere"],
    ["register", "--checkpoint", "nowhere"],
])  # fmt: skip
def test_a_wrong_checkpoint_is_said_before_an_image_is_read(tmp_path, words):
    result = detr(*words, "--store", str(tmp_path / "store"))
    assert result.exit_code == 2 and ("nowhere" in sentence(result) or ". is no" in sentence(result))
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.parquet"))

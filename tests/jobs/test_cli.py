"""The commands as a user types them: help, exit codes, one sentence for what is wrong."""
from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from jobs.cli import COMMANDS, main

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


@pytest.mark.parametrize("command", ["ingest", "train", "sweep", "pipeline"])
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
    assert result.exit_code == 1
    assert "instances_train.json" in sentence(result)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../b.png"])
def test_image_names_that_leave_their_folder(coco, name):
    folder, content = coco
    content["images"][0]["file_name"] = name
    (folder / "instances_train.json").write_text(json.dumps(content))
    result = detr("pipeline", "--store", str(folder / "store"), f"data.path={folder}")
    assert result.exit_code in (1, 2)
    assert name in sentence(result)
    listed = folder / "list.txt"
    listed.write_text(f"images/a.png\n{name}\n")
    result = detr("predict", "--store", str(folder / "store"), "--input", str(listed), "--model", "nowhere")
    assert result.exit_code == 2
    assert name in sentence(result)


def test_predict_without_model_or_input(tmp_path):
    store = str(tmp_path / "store")
    assert detr("predict", "--store", store).exit_code == 2
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    result = detr("predict", "--store", store, str(tmp_path / "a.png"), "--show")
    assert result.exit_code == 2
    assert "--model" in sentence(result)


def test_errors_are_json_where_json_was_asked_for(tmp_path):
    result = detr("ingest", "--json", f"data.path={tmp_path / 'nowhere'}")
    said = json.loads(result.stdout)
    assert said["exit_code"] == result.exit_code == 2 and "nowhere" in said["error"]


def test_sample_writes_a_coco_folder(tmp_path):
    result = detr("sample", "--json", "--output", str(tmp_path / "digits"), "sample.train=6", "sample.val=2",
                  "sample.test=0")  # fmt: skip
    assert result.exit_code == 0
    assert json.loads(result.stdout)["images"] == {"train": 6, "val": 2}
    assert len(list((tmp_path / "digits" / "images").iterdir())) == 8

"""What the page on errors says is what the code says, all reasons for a rejected image and all rules among it."""
from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.common import DONE, FAILED, GATE_REFUSED, INTERRUPTED, WRONG_USE
from pipelines import storage
from pipelines.coco import CROWD
from pipelines.gate import judge
from pipelines.settings import GateSettings

ROOT = Path(__file__).parents[2]
ERRORS = ROOT / "docs" / "errors.md"
VALUE = "…"  # what stands for one, on the page and in what follows
NAMED = {name: value for name, value in {**vars(storage), "CROWD": CROWD}.items() if isinstance(value, str)}
# Where it is decided that an image or an annotation is not used.
DECIDES = [
    ("detr/transforms.py", "decode_image"), ("pipelines/coco.py", "_judge"), ("pipelines/ingest.py", "_row"),
    ("pipelines/predict.py", "fetched"), ("pipelines/predict.py", "read_shard"),
    ("pipelines/registered_model.py", "_encoded"), ("pipelines/storage.py", "_read_local"),
    ("pipelines/storage.py", "read_file"), ("pipelines/storage.py", "read_listed"),
    ("pipelines/storage.py", "reason_of"),
]  # fmt: skip


def rows_of_the_errors() -> list[str]:
    """The first cell of each row of the page's tables."""
    found = []
    for line in ERRORS.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ---"):
            found.pop()  # the table's head
        elif line.startswith("| "):
            found.append(line.split(" | ")[0].removeprefix("| "))
    return found


def words_of_the_errors() -> list[str]:
    """What one sees, as the page has it."""
    return [words for cell in rows_of_the_errors() for words in re.findall(r"`([^`]+)`", cell)]


def text_of(node: ast.expr) -> str:
    """A text of the code with "…" for each of its values; of what is no text nothing."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{\w+\}", VALUE, node.value)  # values of str.format
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value) if isinstance(node.value, ast.Name) and node.value.id in NAMED else VALUE
    if isinstance(node, ast.BinOp):  # a text, and what is said beside it now and then
        return text_of(node.left)
    return NAMED.get(node.id, "") if isinstance(node, ast.Name) else ""


@cache
def texts_of_the_code() -> list[str]:
    """Every text in the modules but their docstrings, whole: none of the pieces between values."""
    found = []
    for path in (path for folder in ("detr", "jobs", "pipelines") for path in (ROOT / folder).glob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        others = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
        others |= {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        found += [re.sub(f"{VALUE}+", VALUE, text_of(node)) for node in nodes
                  if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in others]  # fmt: skip
    return found


def without_brackets(reason: str) -> str:
    return re.sub(r" \(.*\)$", "", reason)


def test_the_words_of_the_errors_are_how_texts_of_the_code_begin():
    words = words_of_the_errors()
    assert len(words) > 200
    assert all(re.search(r"[a-zA-Z]{3}", one) for one in words)
    assert [one for one in words if not any(text.startswith(one) for text in texts_of_the_code())] == []


def test_every_row_of_the_errors_has_words_to_search_for():
    codes = [cell for cell in rows_of_the_errors() if "`" not in cell]
    assert codes == [str(code) for code in (DONE, FAILED, WRONG_USE, GATE_REFUSED, INTERRUPTED)]


def test_an_error_as_json_is_as_the_page_shows_it():
    (shown,) = re.findall(r"```json\n(.*)\n```", ERRORS.read_text(encoding="utf-8"))
    result = CliRunner().invoke(main, ["train", "--json", "train.lrr=1"])
    assert result.stdout == f"{shown}\n"
    assert json.loads(shown) == {"exit_code": result.exit_code, "error": result.stderr.strip()}


def reasons_of(path: str, function: str) -> set[str]:
    """Why a function of the code does not use an image or an annotation."""
    (body,) = (
        node for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name == function
    )  # fmt: skip
    said = []
    for node in ast.walk(body):
        if isinstance(node, ast.Return) and node.value is not None:
            value = node.value.orelse if isinstance(node.value, ast.IfExp) else node.value
            said.append(value.elts[-1] if isinstance(value, ast.Tuple) else value)  # (None, the reason)
        elif isinstance(node, ast.Raise) and ast.unparse(node).startswith(("raise ImageError(", "raise OSError(")):
            said += node.exc.args
        elif isinstance(node, ast.Assign) and ast.unparse(node).startswith("reason"):
            said += node.value.keys if isinstance(node.value, ast.Dict) else [node.value]
    return {text for node in said if (text := text_of(node))}


@pytest.mark.parametrize(("path", "function"), DECIDES)
def test_every_reason_for_a_reject_is_in_the_errors(path, function):
    found = reasons_of(path, function)
    assert found  # else the reasons are made elsewhere by now
    known = {without_brackets(words) for words in words_of_the_errors()}
    assert {without_brackets(reason) for reason in found} <= known


def test_every_rule_of_the_gate_is_in_the_errors():
    """All of them are asked where there is a limit for each, and a champion."""
    figures = {"AP": 0.5, "split_digest": "d", "images_per_second": 1.0,
               "data": {"seen": 0.0, "base_known": True, "rejected": 0.0}}  # fmt: skip
    candidate = {"version": "2", "problem": None, "categories": [], "megabytes": 1.0, "rolled_back": None}
    champion = {"version": "1", "problem": None, "categories": []}
    better = {"first": 0.4, "second": 0.5, "difference": 0.1, "low": 0.1, "high": 0.1}
    comparison = {"split_digest": "d", "images": 9, "resamples": 9, "confidence": 0.95, "seen_by_first": 0.0,
                  "AP": better, "per_class": []}  # fmt: skip
    gate = GateSettings(max_megabytes=1, min_images_per_second=1)
    rules = {rule["rule"] for rule in judge(gate, figures, candidate, champion, comparison)}
    assert "no class is much worse" in rules  # it is asked last
    assert rules <= set(words_of_the_errors())

"""What settings mean: beside each value in YAML that can be given back, and on a page that is up to date."""
from __future__ import annotations

import re
from itertools import pairwise

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from pipelines.settings import Range, RunSettings, flatten, load_settings, override_settings, validate_settings
from pipelines.settings_page import PAGE, as_page, as_yaml, meaning

SPACE = {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "loss.cost_class": [1, 2]}


def said_of(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """The meaning of each setting and of each group."""
    found = {}
    for name, field in model.model_fields.items():
        group = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        found[prefix + name] = meaning(field.annotation.__doc__ if group else field.description)
        found |= said_of(field.annotation, f"{prefix}{name}.") if group else {}
    return found


def test_every_setting_has_a_meaning_in_whole_sentences():
    said = said_of(RunSettings) | said_of(Range)
    assert len(said) > 120
    assert not [name for name, text in said.items() if not re.fullmatch(r"\S+( \S+)+\.", text)]
    assert len(set(said.values())) > len(said) - 10  # precision, compile and the like are told twice


def test_the_page_is_that_of_the_models():
    assert PAGE.read_text(encoding="utf-8") == as_page(), "docs/settings.md is out of date: run `make settings-page`"


def test_every_setting_is_on_the_page_with_the_default_that_a_run_gets():
    """Those of the model are the default preset's, which are others than the class has."""
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| `([^|]*)` \| ([^|]+) \|$", as_page(), re.M)
    found = {name: rest for name, *rest in rows}
    assert found.keys() == flatten(RunSettings().model_dump(mode="json")).keys()
    assert found["model.num_queries"][1] == "60" and found["loss.mal_gamma"][1] == "1.5"
    assert found["gate.max_seen"][0] == "number, at least 0, at most 1"
    assert found["train.use_gpu"][:2] == ["`true` or `false`, or `null`", "null"]
    assert found["train.use_gpu"][2].endswith("by default where Ray has some.")


def test_the_page_says_what_another_preset_sets():
    assert re.search(r"^\| setting \| `tiny` \|.* `base` \|$", as_page(), re.M)
    assert re.search(r"^\| `model.num_queries` \| `60` \|.* `300` \|$", as_page(), re.M)
    assert "panoptic" not in as_page()  # which no run takes


def test_what_is_printed_has_each_meaning_above_its_setting():
    lines = as_yaml(RunSettings()).splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("  num_classes:"))
    start = max(number for number in range(at) if not lines[number].startswith("  #")) + 1
    assert " ".join(line.removeprefix("  # ") for line in lines[start:at]) == said_of(RunSettings)["model.num_classes"]
    for before, line in pairwise(lines):
        assert before.lstrip().startswith("#") or not re.match(r" *\w+:", line), line


@settings(max_examples=50, deadline=None)
@given(path=st.text(), freeze=st.lists(st.text()))
def test_what_is_printed_is_read_back_as_it_was(path, freeze):
    chosen = validate_settings({"data": {"path": path}, "train": {"freeze": freeze}, "sweep": {"space": SPACE}})
    assert yaml.safe_load(as_yaml(chosen)) == chosen.model_dump(mode="json")


def test_what_was_printed_is_taken_as_a_settings_file(tmp_path):
    chosen = override_settings(load_settings(None, ["model=small", "seed=3"]), {"sweep.space": SPACE})
    file = tmp_path / "printed.yaml"
    file.write_text(as_yaml(chosen), encoding="ascii")
    assert load_settings(file) == chosen

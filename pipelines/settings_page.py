"""All settings with what they mean: as YAML for `--print-settings`, and as the page docs/settings.md.

`python -m pipelines.settings_page` writes the page. What a setting means is written below it in its model.
"""
from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from detr.config import PRESETS, ModelConfig
from pipelines.settings import DEFAULT_MODEL, RunSettings, flatten

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
WIDTH = 110  # of comments
HEAD = """# Settings

Every setting with what it may be, its default and what it means. One is given as `key=value` behind a command, or in a
YAML file that `--config` names; what is behind the command wins. `--print-settings` prints what a command resolves to,
with the same words as comments: saved as a file it can be given back with `--config`.

`null` stands for nothing told; the last column says what happens then. AP and shares are numbers from 0 to 1. This page
is made from the models in `pipelines/settings.py` and `detr/config.py` by `make settings-page`.
"""
KINDS = {
    "integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`", "null": "`null`",
    "array": "list", "object": "`{setting: values}`",
}  # fmt: skip
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def as_yaml(settings: BaseModel, indent: str = "") -> str:
    """The settings as YAML, with the meaning of each as a comment above it."""
    lines, values = [], settings.model_dump(mode="json")
    for name, field in type(settings).model_fields.items():
        group = getattr(settings, name)
        if isinstance(group, BaseModel):
            lines += [] if indent else [""]
            said, text = meaning(type(group).__doc__), f"{name}:\n{as_yaml(group, '  ')}"
        else:
            said, text = meaning(field.description), yaml.safe_dump({name: values[name]}, sort_keys=False).rstrip("\n")
        lines += [f"# {line}" for line in textwrap.wrap(said, WIDTH)]
        lines.append(text)
    return textwrap.indent("\n".join(lines), indent)


def as_page() -> str:
    """The text of docs/settings.md."""
    return "\n".join([HEAD, *_sections(RunSettings, RunSettings().model_dump(mode="json"), "")])


def _sections(model: type[BaseModel], defaults: dict[str, Any], prefix: str) -> Iterator[str]:
    """The table of a group of settings, and after it those of the groups in it."""
    known, groups = model.model_json_schema()["properties"], []
    yield "| setting | what it may be | default | what it means |"
    yield "| --- | --- | --- | --- |"
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            groups.append((name, field.annotation))
        else:
            cells = f"`{prefix}{name}`", kind(known[name]), shown(defaults[name]), meaning(field.description)
            yield f"| {' | '.join(cells)} |"
    yield ""
    if model is ModelConfig:
        yield from _presets()
    for name, group in groups:
        yield f"## {prefix}{name}\n\n{textwrap.fill(meaning(group.__doc__), 120)}\n"
        yield from _sections(group, defaults[name], f"{prefix}{name}.")


def _presets() -> Iterator[str]:
    """What of the model they set, but for those with masks, which no run takes."""
    models = {name: ModelConfig.model_validate(name) for name in (DEFAULT_MODEL, *PRESETS)}
    values = {name: flatten(one.model_dump(mode="json")) for name, one in models.items() if not one.masks}
    yield f"The defaults are those of `model={DEFAULT_MODEL}`. Another preset, given as `model=NAME`, has others:\n"
    yield f"| setting | {' | '.join(f'`{name}`' for name in values)} |"
    yield f"| --- |{' --- |' * len(values)}"
    for key, published in flatten(ModelConfig().model_dump(mode="json")).items():
        cells = [of[key] for of in values.values()]
        if any(cell != published for cell in cells):
            yield f"| `model.{key}` | {' | '.join(map(shown, cells))} |"
    yield ""


def meaning(text: str | None) -> str:
    """A description or docstring in one line."""
    return " ".join((text or "").split())


def kind(schema: dict[str, Any]) -> str:
    """What a setting may be, in words, from its JSON schema."""
    if "anyOf" in schema:
        return ", or ".join(kind(one) for one in schema["anyOf"])
    if "enum" in schema:
        *first, last = (f"`{value}`" for value in schema["enum"])
        return f"{', '.join(first)} or {last}"
    limits = [f"{words} {schema[bound]}" for bound, words in BOUNDS.items() if bound in schema]
    return ", ".join([KINDS[schema["type"]], *limits])


def shown(value: Any) -> str:
    """A value as one would write it."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.write_text(as_page(), encoding="utf-8")

"""What README and guide name exists: commands with their options, settings, links, functions, files."""
from __future__ import annotations

import ast
import re
import shlex
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from click.testing import CliRunner
from jobs_api import JobsApi

from jobs.cli import main
from jobs.jobs import main as jobs_group
from jobs.schedule import main as group
from pipelines.settings import RunSettings, flatten, load_settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLOORS = ("detr", "pipelines", "jobs")  # from the lowest
FOLDERS = (*FLOORS, "benchmarks", "configs", "deploy", "docs", "tests")
SETTING = re.compile(rf"({'|'.join(RunSettings.model_fields)})((?:\.[a-z_]+)*)(?:=(.*))?", re.S)
FILES = (".db", ".json", ".onnx", ".safetensors", ".txt", ".yaml")  # model.onnx is no setting


def commands() -> list[str]:
    found = []
    for path in PAGES:
        if path.name == "cluster.md":  # tests/deploy/test_cluster_page.py
            continue
        for block in re.findall(r"```console\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            found += block.strip().splitlines()
    return found


def test_there_are_commands():
    assert {"make run", "make test"} <= set(commands())
    assert len(commands()) > 10


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            there = page.parent / file if file else page
            assert there.exists(), link
            assert not anchor or anchor in anchors(there), link


def test_every_page_of_the_guide_is_in_its_table():
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| \[.*?\]\((.+?)\)", guide, re.M))
    assert {page.name for page in PAGES} - {"README.md", "guide.md"} == told


def is_about_schedules(command: str) -> bool:
    return command.startswith("detr schedule ")


def is_on_a_cluster(command: str) -> bool:
    return command.startswith(("detr submit ", "detr jobs "))


SAID = [re.sub(r"^DETR_LOG=json (.*) 2> .*", r"\1", command) for command in commands()]
RUN_HERE = [c for c in SAID if c.startswith("detr ") and not (is_about_schedules(c) or is_on_a_cluster(c))]


@pytest.mark.parametrize("command", RUN_HERE)
def test_a_documented_command_is_understood(command, tmp_path, monkeypatch):
    arguments = [a for a in shlex.split(command)[1:] if a != "--print-settings"]
    if "--config" in arguments:
        file = arguments.index("--config") + 1
        if "KEY" in arguments[file]:  # made by a sweep
            (tmp_path / "best.yaml").write_text("seed: 0\n")
            arguments[file] = str(tmp_path / "best.yaml")
        else:
            arguments[file] = str(ROOT / arguments[file])
    result = CliRunner().invoke(main, [*arguments, *([] if "--help" in arguments else ["--print-settings"])])
    assert result.exit_code == 0, result.output


def test_the_documented_schedules_can_be_made_and_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [shlex.split(c)[1:] for c in commands() if is_about_schedules(c)]
    assert {arguments[1] for arguments in asked} == set(group.commands)
    for arguments in asked:
        here = ["--help"] if arguments[1] in ("start", "run") else []  # these run what was scheduled
        result = CliRunner().invoke(main, [*arguments, *here])
        assert result.exit_code == 0, result.output


def test_the_documented_commands_for_a_cluster_are_understood(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    asked = [shlex.split(c)[1:] for c in commands() if is_on_a_cluster(c)]
    assert {words[1] for words in asked if words[0] == "jobs"} == set(jobs_group.commands)
    with JobsApi(ends=True) as api:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", api.address)
        for words in asked:
            for word in words:
                if re.fullmatch(r"detr-\w+-[0-9a-f]{16}", word):
                    api.add(word, "SUCCEEDED", code=0)
            result = CliRunner().invoke(main, words)
            assert result.exit_code == 0, result.output
        assert any(words[0] == "submit" for words in asked)


def test_the_python_of_the_guide_finds_what_it_imports():
    """The README's and that of the attention maps are run by tests of their own."""
    blocks = [code for page in PAGES for code in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)]
    imports = [node for code in blocks for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    assert len(blocks) >= 6 and len(imports) >= 8
    for node in imports:
        namespace = {}
        exec(ast.unparse(node), namespace)
        assert {alias.name for alias in node.names} <= namespace.keys()


OF_OTHERS = ("ray start ", "ray get-auth-token ", "mlflow server ")


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith(OF_OTHERS)])
def test_a_documented_command_of_others_has_these_options(command):
    from mlflow.cli import cli as mlflow_commands
    from ray.scripts.scripts import cli as ray_commands

    program, name, *words = shlex.split(command.partition(" > ")[0].rstrip(" &"))
    group = {"ray": ray_commands, "mlflow": mlflow_commands}[program]
    group.get_command(None, name).make_context(name, words)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_a_documented_target_exists(command):
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def in_backquotes() -> list[tuple[str, str]]:
    """(page, text) of all that stands in backquotes; of code blocks, which other tests try, nothing."""
    found = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        found += [(page.name, " ".join(quoted.split())) for quoted in re.findall(r"`([^`]+)`", text)]
    return found


def settings_named() -> list[tuple[str, str, str | None]]:
    """(page, name, value) of settings in backquotes, alone or in a command."""
    found = []
    for page, text in in_backquotes():
        words = re.sub(r"^detr [a-z]+ ", "", text)
        try:
            words = shlex.split(words)
        except ValueError:  # no command
            continue
        for word in words:
            match = SETTING.fullmatch(word)
            if not match or word.endswith(FILES):
                break  # what begins otherwise is a sentence, perhaps of an error
            if match[2] or match[3]:
                found.append((page, match[1] + match[2], match[3]))
    return found


def test_settings_in_backquotes_exist_and_take_these_values():
    known = set(flatten(RunSettings().model_dump(mode="json")))
    known |= {name.rsplit(".", cut)[0] for name in known for cut in range(1, name.count(".") + 1)}  # groups
    known.add("model.preset")
    named = settings_named()
    assert len({name for _, name, _ in named}) > 60
    assert not [(page, name) for page, name, _ in named if name not in known]
    for _, name, value in named:
        if value and not value.isupper():  # NAME stands for something
            load_settings(None, [f"{name}={value}"])


def is_defined(name: str) -> bool:
    """Whether there is a module of this dotted name, or a function, class, method or constant in one; none is imported.

    What a module has only from another is not where the name says.
    """
    parts = name.split(".")
    files = (ROOT.joinpath(*parts[:end]).with_suffix(".py") for end in (2, 3))
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return False
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for part in parts[len(file.relative_to(ROOT).parts) :]:
        inner = None
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]
            if part in names:
                inner = getattr(node, "body", [])
        if inner is None:
            return False
        body = inner
    return True


def test_functions_in_backquotes_are_where_the_pages_say():
    name = re.compile(rf"((?:{'|'.join(FLOORS)})(?:\.\w+)+)(?:\(.*\))?")
    named = {(page, match[1]) for page, text in in_backquotes() if (match := name.fullmatch(text))}
    assert len(named) > 50
    assert not [(page, name) for page, name in sorted(named) if not is_defined(name)]


def test_files_in_backquotes_are_in_the_repository():
    named = {(page, text) for page, text in in_backquotes() if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", text)}
    assert len(named) > 20
    assert not [(page, name) for page, name in sorted(named) if not (ROOT / name).exists()]


def test_imports_lead_down_only_and_never_round_in_a_circle():
    """As docs/design.md says of the three floors; imports within functions count, too."""
    imports: dict[str, set[str]] = {}
    for file in (file for floor in FLOORS for file in (ROOT / floor).glob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        found = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imports[f"{file.parent.name}.{file.stem}"] = found
    assert len(imports) > 80
    for module, found in imports.items():
        floor = module.partition(".")[0]
        above = FLOORS[FLOORS.index(floor) + 1 :] + (("ray", "mlflow") if floor == "detr" else ())
        assert not {name for name in found if name.partition(".")[0] in above}, module
    TopologicalSorter({module: found & imports.keys() for module, found in imports.items()}).prepare()  # CycleError

"""The commands in README and guide exist, with these options and settings; its links lead somewhere."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from jobs_api import JobsApi

from jobs.cli import main
from jobs.jobs import main as jobs_group
from jobs.schedule import main as group

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_a_documented_target_exists(command):
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)

"""The image: what deploy/Dockerfile says about versions, users and secrets, and who names it."""
from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from jobs.common import KEEP_BLOCKS

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
PLACES = ["cluster.yaml", "deploy/Dockerfile", "docs/cluster.md", *(f"deploy/{name}.yaml" for name in (
    "mlflow", "raycluster", "rayjob", "raycronjob"))]  # fmt: skip


def pinned(package: str) -> str:
    return re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M).group(1)


def steps() -> list[tuple[str, str]]:
    """Instruction and rest of each step, its lines joined and without comments."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.strip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


@pytest.mark.parametrize("place", PLACES)
def test_every_image_has_the_tag_of_the_versions_that_were_tested(place):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    tags = {"detr": f"{version}-ray{pinned('ray')}", "detr-mlflow": f"{version}-mlflow{pinned('mlflow')}"}
    found = re.findall(r"[\w.]+/(detr(?:-mlflow)?):([\w.-]+)", (ROOT / place).read_text(encoding="utf-8"))
    assert found
    for name, tag in found:
        assert tag == tags[name]
    manifests = [line for line in (ROOT / place).read_text(encoding="utf-8").splitlines() if " image: " in line]
    assert not any(re.search(r":latest|image: [\w./-]+\s*(#|$)", line) for line in manifests)


def test_rays_version_is_the_one_that_was_tested():
    for name in ("raycluster", "rayjob", "raycronjob"):
        assert f"rayVersion: {pinned('ray')} " in (ROOT / "deploy" / f"{name}.yaml").read_text()


def test_what_is_installed_is_what_was_tested():
    commands = [command.strip() for name, rest in steps() if name == "RUN" for command in rest.split("&&")]
    installs = [shlex.split(command) for command in commands if command.startswith("pip install")]
    assert len(installs) == 3
    assert all(words[words.index("-c") + 1] == "/opt/constraints.txt" for words in installs)
    assert all(re.fullmatch(r"\S+:\d+\.\d+\.\d+-\S+", rest.split()[0]) or rest.split()[0] == "base"
               for name, rest in steps() if name == "FROM")  # fmt: skip


def test_nobody_is_root_and_the_last_image_is_the_clusters():
    last = {}
    for name, rest in steps():
        if name == "FROM":
            stage = rest.split(" AS ")[1]
        if name == "USER":
            last[stage] = rest
    assert last == {"mlflow": "1000", "cluster": "1000"} and stage == "cluster"


def test_it_is_safe_by_default_and_holds_no_secret():
    environment = " ".join(rest for name, rest in steps() if name == "ENV")
    for told in ("RAY_AUTH_MODE=token", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false", "HOME=/home/ray"):
        assert told in environment
    assert {f"{name}={value}" for name, value in KEEP_BLOCKS.items()} <= set(environment.split())
    assert not any(name == "ARG" for name, _ in steps())
    assert not re.search(r"(PASSWORD|SECRET|TOKEN|KEY)\w*=", DOCKERFILE)


def test_only_what_is_copied_goes_to_the_builder():
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in allowed  # all else stays here
    copied = [words for name, rest in steps() if name == "COPY" for words in rest.split()[:-1]]
    assert {line.removeprefix("!") for line in allowed if line.startswith("!")} == set(copied)
    assert all((ROOT / name).exists() for name in copied)

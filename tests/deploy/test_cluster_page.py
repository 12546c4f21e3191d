"""docs/cluster.md: what can be run here is run; of the rest, its options, files and names are there."""
from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_commands

from jobs.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
CLOUD = ("aws ", "docker ", "helm ", "kubectl ", "ray up", "ray down", "ray dashboard", "ray exec", "ray attach")
TAKES_PLACE_OF = {
    "YOUR-ACCOUNT": "210987654321", "YOUR-REGION": "eu-central-1", "YOUR-SUBNET": "subnet-aa", "YOUR-GROUP": "sg-bb",
    "YOUR-REGISTRY": "images.my-company.net", "YOUR-BUCKET": "my-bucket",
}  # fmt: skip


def blocks() -> list[tuple[str, list[str]]]:
    """The paragraph before each block of commands, and its lines."""
    found = re.findall(r"((?:[^\n]+\n)+)\n```console\n(.*?)```", PAGE, re.S)
    return [(before, lines.strip().splitlines()) for before, lines in found]


def commands() -> list[str]:
    return [line for _, lines in blocks() for line in lines]


def test_what_only_a_cloud_can_run_is_marked():
    assert len(blocks()) == PAGE.count("```console") > 15
    for before, lines in blocks():
        if any(line.startswith(CLOUD) for line in lines):
            assert re.search(r"\*in the cloud:?\*", before, re.I), lines


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("detr ")])
def test_a_command_of_ours_is_understood(command):
    words = shlex.split(command)[1:]
    assert words[0] in COMMANDS
    if words[0] == "submit":  # what the cluster is to run
        result = CliRunner().invoke(main, [*words[1:], "--print-settings"])
        assert result.exit_code == 0, result.output
        settings = yaml.safe_load(result.stdout)
        assert settings["tracking"]["uri"].startswith("http://") and settings["cluster"]["gpus"] >= 1
        assert words[words.index("--store") + 1].startswith("s3://")


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("ray ")])
def test_a_command_of_rays_has_these_options(command):
    words = shlex.split(command.removesuffix(" > /dev/null"))[1:]
    ray_commands.get_command(None, words[0]).make_context(words[0], words[1:])


def test_secrets_are_made_as_told_and_nobody_else_reads_them(tmp_path):
    made = [lines for _, lines in blocks() if lines[0] == "umask 077"]
    assert len(made) == 2
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    for lines in made:
        done = subprocess.run(
            ["bash", "-euc", "\n".join(lines)], env=environment | {"PATH": tools}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert not done.stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / ".ray" / "auth_token" in files and len(files) == 7
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert len(path.read_text()) >= 32
    user, password = (tmp_path / "detr-secrets" / "cluster.env").read_text().splitlines()
    assert user == "MLFLOW_TRACKING_USERNAME=admin" and re.fullmatch(r"MLFLOW_TRACKING_PASSWORD=[0-9a-f]{32}", password)
    # As environment variables of a pod they must not end in a new line.
    assert not any(path.read_text().endswith("\n") for path in (tmp_path / "detr-secrets" / "mlflow").iterdir())
    told = {line.split("=")[0] for c in commands() if "create secret" in c for line in c.split("--from-file=")[1:]}
    assert told == {"$HOME/detr-secrets/mlflow", "MLFLOW_TRACKING_PASSWORD"}


def test_ones_own_names_are_put_in_everywhere(tmp_path):
    (tmp_path / "deploy").mkdir()
    files = [ROOT / "cluster.yaml", *(ROOT / "deploy").glob("*.yaml")]
    for file in files:
        (tmp_path / file.relative_to(ROOT)).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    edits = [c for c in commands() if c.startswith("sed ")]
    assert len(edits) == 2
    for edit in edits:
        for mine, value in TAKES_PLACE_OF.items():
            edit = edit.replace(mine, value)
        subprocess.run(["bash", "-euc", edit], cwd=tmp_path, check=True)
    for file in files:
        before = file.read_text(encoding="utf-8").splitlines()
        after = (tmp_path / file.relative_to(ROOT)).read_text(encoding="utf-8").splitlines()
        for old, new in zip(before, after, strict=True):
            assert not re.search(r"123456789012|us-east-1|0123456789abcdef0|registry\.example|detr-example", new), new
            assert old != new or not re.search(r"# yours$", old), old
    validate_config(prepare_config(yaml.safe_load((tmp_path / "cluster.yaml").read_text())))


def test_files_and_parameters_that_it_names_are_there():
    named = set(re.findall(r"(?:deploy/[\w.]+|cluster\.yaml)", PAGE))
    assert len(named) >= 8 and all((ROOT / name.rstrip(".")).exists() for name in named - {"deploy/"})
    (deploy,) = [c for c in commands() if c.startswith("aws cloudformation deploy")]
    told = re.findall(r"(\w+)=", deploy.split("--parameter-overrides")[1])
    parameters = (ROOT / "deploy" / "aws.yaml").read_text().split("Parameters:")[1].split("Resources:")[0]
    assert told == re.findall(r"^  (\w+):", parameters, re.M)
    assert "/detr/cluster.env" in PAGE and "parameter/detr/cluster.env" in (ROOT / "deploy" / "aws.yaml").read_text()
    for link in re.findall(r"\]\((\.\./[^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link


def test_the_server_on_the_head_is_started_with_options_that_there_are():
    from mlflow.cli import server

    (command,) = [c for c in commands() if "mlflow server" in c]
    inner = shlex.split(command)[-1]
    asked = server.make_context("server", shlex.split(inner.split("mlflow server ")[1])).params
    assert asked["app_name"] == "basic-auth" and asked["artifacts_destination"].startswith("s3://")
    subprocess.run(["bash", "-n", "-c", inner], check=True)

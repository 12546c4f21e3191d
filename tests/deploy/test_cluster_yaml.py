"""cluster.yaml: what Ray's launcher makes of it, without AWS, and what it promises."""
from __future__ import annotations

import re
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.aws.config import _check_ami, _configure_iam_role, _configure_security_group
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.updater import NodeUpdater
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.scripts.scripts import start

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cluster() -> dict:
    """As Ray's launcher sees it: its own defaults for AWS, with ours over them; valid by its own schema."""
    config = prepare_config(yaml.safe_load(TEXT))
    validate_config(config)
    return config


def workers(cluster) -> dict:
    return {name: kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]}


def test_a_misspelt_setting_would_be_seen(cluster):
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config({**cluster, "idle_timeout_minute": 5})


def test_machines_are_what_ec2_takes(cluster):
    client = boto3.client("ec2", region_name="us-east-1", aws_access_key_id="none", aws_secret_access_key="none")
    shape = client.meta.service_model.operation_model("RunInstances").input_shape
    for kind in cluster["available_node_types"].values():
        config = dict(kind["node_config"])
        subnet = config.pop("SubnetIds")[0]  # as the launcher does
        asked = {**config, "SubnetId": subnet, "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(asked, shape)
        assert not report.has_errors(), report.generate_report()
        assert ParamValidator().validate({**asked, "InstanceTyp": "m7i.xlarge"}, shape).has_errors()


def test_the_launcher_adds_nothing_of_its_own_on_aws(cluster, monkeypatch):
    """No role with all rights, no group open to the world on port 22, no image of 2021: it would ask AWS for them."""
    monkeypatch.setattr("ray.autoscaler._private.aws.config._resource", lambda *asked: pytest.fail(f"asks for {asked}"))
    before = yaml.safe_dump(cluster)
    for configure in (_configure_iam_role, _configure_security_group, _check_ami):
        configure(cluster)
    assert yaml.safe_dump(cluster) == before


def test_the_head_does_no_work_and_the_others_come_and_go(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0} and head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]  # with it goes the cluster
    assert 0 < cluster["idle_timeout_minutes"] <= 15
    for kind in workers(cluster).values():
        assert kind["min_workers"] == 0 < kind["max_workers"] <= cluster["max_workers"]
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    with_gpu = [name for name, kind in workers(cluster).items() if kind["resources"].get("GPU")]
    assert with_gpu == ["gpu"] and len(workers(cluster)) == 2
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_nothing_is_reached_from_outside(cluster):
    assert cluster["provider"]["use_internal_ips"] is True
    assert cluster["auth"]["ssh_proxy_command"].startswith("aws ssm start-session ")
    for kind in cluster["available_node_types"].values():
        assert kind["node_config"]["SecurityGroupIds"] and "NetworkInterfaces" not in kind["node_config"]
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in kind["node_config"]["BlockDeviceMappings"])
    assert "0.0.0.0" not in TEXT and "0.0.0.0" not in yaml.safe_dump(cluster)
    (head,) = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head


def test_the_commands_that_start_ray_are_understood(cluster):
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    found = [command.split("ray start ")[1].split() for command in commands if "ray start" in command]
    heads = [start.make_context("ray start", list(words)).params["head"] for words in found]
    assert heads == [True, False]


def test_no_secret_and_no_key_stands_in_it(cluster):
    assert not re.search(r"(AKIA|ASIA)[A-Z0-9]{12,}|BEGIN .*KEY", TEXT)
    told = yaml.safe_dump(yaml.safe_load(TEXT), width=1000)  # without the comments
    assert not re.search(r"(TOKEN|PASSWORD|SECRET|KEY)\w*=", told, re.I)
    assert {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in workers(cluster).values()} == {"detr-worker"}
    # Ray's token is a file here and there, and no machine's container starts without asking for it.
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_containers_ask_for_a_token_and_have_gpus_only_where_these_are(cluster):
    config = AutoscalingConfig({**cluster, "max_workers": 12}, skip_content_hash=True)
    for name in cluster["available_node_types"]:
        docker = config.get_docker_config(name)
        kind = "head" if name == cluster["head_node_type"] else "worker"
        options = docker["run_options"] + docker.get(f"{kind}_run_options", [])
        command = docker_start_cmds(
            "ubuntu", docker["image"], cluster["file_mounts"], docker["container_name"], options,
            cluster["cluster_name"], "/home/ray", "docker",
        )  # fmt: skip
        assert "--env RAY_AUTH_MODE=token" in command and "/auth_token:/home/ray/.ray/auth_token" in command
        assert ("--gpus all" in command) == (name == "gpu")


class OneMachine(NodeProvider):
    """A head that is there, for Ray's launcher to set up."""

    def __init__(self, config: dict):
        super().__init__(config, "detr")
        self.tags = {}

    def node_tags(self, node_id):
        return dict(self.tags)

    def set_node_tags(self, node_id, tags):
        self.tags.update(tags)

    def internal_ip(self, node_id):
        return "10.0.0.5"

    def is_terminated(self, node_id):
        return False


class Shell:
    """Notes the commands that would be run, and answers as the machine would."""

    def __init__(self):
        self.seen: list[str] = []

    def check_call(self, command, *others, **more):
        self.seen.append(" ".join(command))

    def check_output(self, command):
        self.seen.append(" ".join(command))
        answers = {"State.Running": b"true" if any("docker run" in c for c in self.seen) else b"",
                   "Config.Env": b'["HOME=/home/ray"]', "printenv HOME": b"/home/ray"}  # fmt: skip
        return next((answer for asked, answer in answers.items() if asked in command[-1]), b"")


def test_the_launcher_sets_up_a_head_without_showing_the_token(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789token")
    shell = Shell()
    monkeypatch.setattr("ray.autoscaler._private.command_runner.run_cmd_redirected",
                        lambda command, **more: shell.check_call(command))  # fmt: skip
    updater = NodeUpdater(
        node_id="i-0abc", provider_config=cluster["provider"], provider=OneMachine(cluster["provider"]),
        auth_config=cluster["auth"], cluster_name=cluster["cluster_name"], file_mounts=cluster["file_mounts"],
        initialization_commands=cluster["initialization_commands"], setup_commands=cluster["head_setup_commands"],
        ray_start_commands=cluster["head_start_ray_commands"], runtime_hash="", file_mounts_contents_hash="",
        is_head_node=True, node_resources=cluster["available_node_types"]["head"]["resources"], process_runner=shell,
        docker_config=cluster["docker"], use_internal_ip=True,
    )  # fmt: skip
    monkeypatch.setattr(updater.cmd_runner.ssh_command_runner, "ssh_control_path", None)  # a folder in /tmp
    updater.provider_type = "other"  # AWS's own would look for CloudWatch
    updater.run()

    def place(words: str) -> int:
        return next(number for number, command in enumerate(shell.seen) if words in command)

    order = ["rsync", "get-parameter", "docker login", "docker pull", "docker run", "ray start --head"]
    assert [place(words) for words in order] == sorted(place(words) for words in order)
    assert f"{tmp_path}/.ray/auth_token ubuntu@i-0abc:" in shell.seen[place("rsync")]
    assert "/auth_token:/home/ray/.ray/auth_token" in shell.seen[place("docker run")]
    assert '"CPU":0,"GPU":0' in shell.seen[place("ray start --head")]
    assert all("ProxyCommand=aws ssm" in command for command in shell.seen)
    assert not any("0123456789token" in command for command in shell.seen)


def test_every_setting_is_explained():
    lines = TEXT.splitlines()
    top = [number for number, line in enumerate(lines) if re.match(r"\w+:", line)]
    kinds = [number for number, line in enumerate(lines) if re.match(r"  (head|gpu|cpu):$", line)]
    assert len(top) > 15 and len(kinds) == 3
    headings = {"provider", "auth", "docker", "available_node_types", "head_node_type", "head_setup_commands",
                "worker_setup_commands", "worker_start_ray_commands"}  # fmt: skip
    for number in [*top, *kinds]:
        if lines[number].split(":")[0] not in headings:
            assert lines[number - 1].strip().startswith("#"), lines[number]

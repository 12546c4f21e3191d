"""deploy/aws.yaml: the rights that it gives, and that cluster.yaml names what it makes."""
from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


class Loader(yaml.SafeLoader):
    """CloudFormation's own tags as {tag: value}."""


def tagged(loader: Loader, tag: str, node: yaml.Node):
    return {tag: node.value if isinstance(node, yaml.ScalarNode) else loader.construct_sequence(node, deep=True)}


Loader.add_multi_constructor("!", tagged)


@pytest.fixture(scope="module")
def resources() -> dict:
    text = (ROOT / "deploy" / "aws.yaml").read_text(encoding="utf-8")
    assert not any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader))  # unknown to AWS
    return yaml.load(text, Loader)["Resources"]


def statements(resources: dict, *names: str) -> list[dict]:
    found = []
    for name in names:
        properties = resources[name]["Properties"]
        documents = [policy["PolicyDocument"] for policy in properties.get("Policies", [properties])]
        found += [statement for document in documents for statement in document["Statement"]]
    return found


def actions(statement: dict) -> set[str]:
    return {statement["Action"]} if isinstance(statement["Action"], str) else set(statement["Action"])


def test_nobody_outside_is_let_in(resources):
    assert "SecurityGroupIngress" not in resources["Machines"]["Properties"]
    rules = [r["Properties"] for r in resources.values() if r["Type"] == "AWS::EC2::SecurityGroupIngress"]
    assert [(rule["GroupId"], rule["SourceSecurityGroupId"]) for rule in rules] == [({"Ref": "Machines"},) * 2]
    assert not rules[0].keys() & {"CidrIp", "CidrIpv6"}
    blocked = resources["Store"]["Properties"]["PublicAccessBlockConfiguration"]
    assert len(blocked) == 4 and all(blocked.values())


def test_rights_are_few(resources):
    every = statements(resources, "Work", "HeadRole")
    for statement in every:
        assert statement["Effect"] == "Allow" and not any(action.endswith("*") for action in actions(statement))
        if statement["Resource"] == "*":  # where AWS knows nothing narrower, or it is limited by iam:PassRole
            assert actions(statement) <= {
                "ecr:GetAuthorizationToken", "ec2:DescribeInstances", "ec2:DescribeInstanceTypes",
                "ec2:DescribeImages", "ec2:RunInstances",
            }  # fmt: skip
    (handed,) = [s for s in every if "iam:PassRole" in actions(s)]
    assert handed["Resource"] == {"GetAtt": "WorkerRole.Arn"}
    (ended,) = [s for s in every if "ec2:TerminateInstances" in actions(s)]
    name = yaml.safe_load((ROOT / "cluster.yaml").read_text())["cluster_name"]
    assert ended["Condition"] == {"StringEquals": {"aws:ResourceTag/ray-cluster-name": name}}
    worker = resources["WorkerRole"]["Properties"]
    assert not worker.keys() & {"Policies", "ManagedPolicyArns"}  # but the common one


def test_the_cluster_names_what_it_makes(resources):
    kinds = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    made = {r["Properties"]["InstanceProfileName"]: r["Properties"]["Roles"] for r in resources.values()
            if r["Type"] == "AWS::IAM::InstanceProfile"}  # fmt: skip
    used = {kind: spec["node_config"]["IamInstanceProfile"]["Name"] for kind, spec in kinds.items()}
    assert made == {"detr-head": [{"Ref": "HeadRole"}], "detr-worker": [{"Ref": "WorkerRole"}]}
    assert used == {"head": "detr-head", "gpu": "detr-worker", "cpu": "detr-worker"}
    repositories = [r["Properties"] for r in resources.values() if r["Type"] == "AWS::ECR::Repository"]
    assert {repository["RepositoryName"] for repository in repositories} == {"detr", "detr-mlflow"}

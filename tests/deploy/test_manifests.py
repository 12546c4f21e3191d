"""deploy/*.yaml for Kubernetes: valid by its published schemas and KubeRay's, and what they promise."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config

from jobs.cli import main

ROOT = Path(__file__).parents[2]
FILES = ("base", "mlflow", "raycluster", "rayjob", "raycronjob")
KUBERNETES = "1.37"
OBJECTS = {name: list(yaml.safe_load_all((ROOT / "deploy" / f"{name}.yaml").open())) for name in FILES}
ALL = [thing for things in OBJECTS.values() for thing in things]

# The fields of KubeRay's objects that we may use, as its reference says for 1.6.2 and for 1.7.0 alike: each with its
# type, the name of what it holds, or Kubernetes' own kind of that name. What is not here is an error.
KUBERAY = {
    "RayCluster": {"apiVersion": str, "kind": str, "metadata": dict, "spec": "RayClusterSpec"},
    "RayJob": {"apiVersion": str, "kind": str, "metadata": dict, "spec": "RayJobSpec"},
    "RayCronJob": {"apiVersion": str, "kind": str, "metadata": dict, "spec": "RayCronJobSpec"},
    "RayClusterSpec": {
        "rayVersion": str, "authOptions": "AuthOptions", "enableInTreeAutoscaling": bool, "suspend": bool,
        "autoscalerOptions": "AutoscalerOptions", "headGroupSpec": "HeadGroupSpec",
        "workerGroupSpecs": ["WorkerGroupSpec"], "headServiceAnnotations": dict,
    },
    "AuthOptions": {"mode": ("token", "disabled"), "secretName": str, "enableK8sTokenAuth": bool},
    "AutoscalerOptions": {
        "idleTimeoutSeconds": int, "upscalingMode": ("Default", "Aggressive", "Conservative"), "version": ("v1", "v2"),
        "securityContext": "SecurityContext", "image": str,
    },
    "HeadGroupSpec": {
        "template": "PodTemplate", "rayStartParams": {str: str}, "enableIngress": bool, "serviceType": str,
    },
    "WorkerGroupSpec": {
        "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "idleTimeoutSeconds": int,
        "numOfHosts": int, "rayStartParams": {str: str}, "template": "PodTemplate",
    },
    "RayJobSpec": {
        "entrypoint": str, "activeDeadlineSeconds": int, "backoffLimit": int, "rayClusterSpec": "RayClusterSpec",
        "submitterPodTemplate": "PodTemplate", "clusterSelector": dict, "runtimeEnvYAML": str, "jobId": str,
        "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "ttlSecondsAfterFinished": int, "shutdownAfterJobFinishes": bool, "suspend": bool,
    },
    "RayCronJobSpec": {"jobTemplate": "RayJobSpec", "schedule": str, "suspend": bool},
}  # fmt: skip
REQUIRED = {
    "RayClusterSpec": {"headGroupSpec"}, "HeadGroupSpec": {"template", "rayStartParams"},
    "WorkerGroupSpec": {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"},
    "RayCronJobSpec": {"jobTemplate", "schedule"}, "RayJobSpec": {"entrypoint", "rayClusterSpec"},
}  # fmt: skip


def check_kuberay(value, kind, where: str) -> None:
    """Raise AssertionError where a value is not of a kind of KUBERAY, or of Kubernetes'."""
    if isinstance(kind, str) and kind in KUBERAY:
        unknown = value.keys() - KUBERAY[kind].keys()
        assert not unknown, f"{where}: {kind} has no {unknown}"
        assert REQUIRED.get(kind, set()) <= value.keys(), f"{where}: {kind} lacks something"
        for key, inner in value.items():
            check_kuberay(inner, KUBERAY[kind][key], f"{where}.{key}")
    elif kind == "PodTemplate":
        validate({"apiVersion": "v1", "kind": "PodTemplate", "template": value})
    elif kind == "SecurityContext":
        container = {"name": "any", "image": "any", "securityContext": value}
        validate({"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [container]}})
    elif isinstance(kind, list):
        for number, inner in enumerate(value):
            check_kuberay(inner, kind[0], f"{where}[{number}]")
    elif isinstance(kind, tuple):
        assert value in kind, f"{where}: {value} is none of {kind}"
    elif isinstance(kind, dict):
        assert all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()), f"{where}: {value}"
    else:
        assert type(value) is kind, f"{where}: {value!r} is no {kind.__name__}"


def validate(thing: dict) -> None:
    kubernetes_validate.validate(thing, KUBERNETES, strict=True)


def pod_templates() -> list[tuple[str, dict]]:
    """Where each stands, and the template."""
    found = []

    def look(value, where):
        if isinstance(value, dict):
            if "containers" in value.get("spec", {} if "spec" in value else ()):
                found.append((where, value))
            for key, inner in value.items():
                look(inner, f"{where}.{key}")
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                look(inner, f"{where}[{number}]")

    for name, things in OBJECTS.items():
        for thing in things:
            look(thing, f"{name}.{thing['metadata'].get('name', thing['kind'])}")
    return found


def clusters() -> dict[str, dict]:
    """The specs of the three Ray clusters, by file."""
    return {
        "raycluster": OBJECTS["raycluster"][0]["spec"],
        "rayjob": OBJECTS["rayjob"][0]["spec"]["rayClusterSpec"],
        "raycronjob": OBJECTS["raycronjob"][0]["spec"]["jobTemplate"]["rayClusterSpec"],
    }


def entrypoints() -> list[str]:
    return [OBJECTS["rayjob"][0]["spec"]["entrypoint"],
            OBJECTS["raycronjob"][0]["spec"]["jobTemplate"]["entrypoint"]]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_object_is_valid(name):
    assert OBJECTS[name]
    for thing in OBJECTS[name]:
        if thing["apiVersion"] == "ray.io/v1":
            check_kuberay(thing, thing["kind"], thing["kind"])
        else:
            validate(thing)
        assert thing["kind"] == "Namespace" or thing["metadata"]["namespace"] == "detr"


def test_the_schemas_would_see_a_mistake():
    spec = OBJECTS["raycluster"][0]["spec"]
    with pytest.raises(AssertionError, match="minReplica'"):
        check_kuberay({**spec["workerGroupSpecs"][0], "minReplica": 0}, "WorkerGroupSpec", "a group")
    template = {**spec["headGroupSpec"]["template"], "sepc": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_kuberay(template, "PodTemplate", "a template")


def test_pods_are_what_the_namespace_lets_in():
    """Kubernetes' restricted standard, which base.yaml enforces."""
    assert len(pod_templates()) == 13
    for where, template in pod_templates():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}, where
        for volume in spec.get("volumes", []):
            assert volume.keys() - {"name"} <= {"configMap", "emptyDir", "secret"}, where
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, where
            assert not any("hostPort" in port for port in container.get("ports", [])), where
            assert "memory" in container["resources"]["limits"], where


def test_only_what_needs_kubernetes_api_gets_a_key_to_it():
    having = [where for where, pod in pod_templates() if pod["spec"].get("automountServiceAccountToken", True)]
    assert len(having) == 3 and all("headGroupSpec" in where for where in having)  # Ray's autoscaler


def test_nothing_is_offered_to_the_outside():
    assert not {thing["kind"] for thing in ALL} & {"Ingress", "Gateway", "HTTPRoute"}
    for thing in ALL:
        if thing["kind"] == "Service":
            assert thing["spec"].get("type", "ClusterIP") == "ClusterIP"
    for spec in clusters().values():
        assert not spec["headGroupSpec"].keys() & {"enableIngress", "serviceType", "headService"}
    assert clusters()["raycluster"]["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"


def test_policies_close_all_and_open_what_there_is():
    policies = {thing["metadata"]["name"]: thing["spec"] for thing in ALL if thing["kind"] == "NetworkPolicy"}
    assert policies["nobody"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    labels = [template["metadata"]["labels"] for _, template in pod_templates()]
    for name, spec in policies.items():
        peers = [peer for rule in spec.get("ingress", []) for peer in rule["from"]]
        pods = [spec["podSelector"], *(peer["podSelector"] for peer in peers if "podSelector" in peer)]
        for pod in pods if name != "nobody" else []:
            told = {k: v for k, v in pod["matchLabels"].items() if not k.startswith("ray.io/")}  # the operator's own
            assert told and any(told.items() <= there.items() for there in labels), (name, pod)
        for rule in spec.get("ingress", []):  # what comes from elsewhere, only to one port
            assert rule.get("ports") or rule["from"] == [{"podSelector": {"matchLabels": {"part": "ray"}}}]
    covered = [spec["podSelector"].get("matchLabels", {}).get("part") for spec in policies.values()]
    assert set(covered) == {None, "ray", "mlflow", "postgres"}


def test_secrets_are_named_and_nowhere_written():
    assert "Secret" not in {thing["kind"] for thing in ALL}
    names = set()
    for where, template in pod_templates():
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                if re.search(r"PASSWORD$|SECRET|TOKEN|_KEY$", variable["name"]):
                    names.add(variable["valueFrom"]["secretKeyRef"]["name"])
                else:
                    assert not re.search(r"://[^/@]*:[^/@]*@", variable["value"]), where
            names |= {source["secretRef"]["name"] for source in container.get("envFrom", [])}
        names |= {v["secret"]["secretName"] for v in template["spec"].get("volumes", []) if "secret" in v}
    assert names == {"mlflow", "detr-jobs", "s3"}
    guide = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert all(f"create secret generic {name}" in guide for name in names)


def test_ray_asks_for_a_token_everywhere():
    for spec in clusters().values():
        assert spec["authOptions"] == {"mode": "token"}
        for variables in (c.get("env", []) for c in spec["headGroupSpec"]["template"]["spec"]["containers"]):
            assert "RAY_AUTH_MODE" not in {variable["name"] for variable in variables}  # the operator sets it


def test_rays_autoscaler_reads_a_head_without_work_and_groups_that_begin_at_none():
    config = _derive_autoscaling_config_from_ray_cr(OBJECTS["raycluster"][0])
    validate_config(config)
    kinds = config["available_node_types"]
    assert kinds[config["head_node_type"]]["resources"]["CPU"] == 0
    assert {name: kinds[name]["min_workers"] for name in ("gpu", "cpu")} == {"gpu": 0, "cpu": 0}
    assert kinds["gpu"]["resources"]["GPU"] == 1 and "GPU" not in kinds["cpu"]["resources"]
    assert all(kinds[name]["max_workers"] > 0 < kinds[name]["resources"]["CPU"] for name in ("gpu", "cpu"))
    assert config["idle_timeout_minutes"] == 10


def test_the_three_clusters_are_one():
    def common(spec):
        spec = yaml.safe_load(yaml.safe_dump(spec))
        spec["headGroupSpec"]["rayStartParams"].pop("dashboard-host")
        return spec

    first, *others = map(common, clusters().values())
    assert all(other == first for other in others)


@pytest.mark.parametrize("entrypoint", entrypoints())
def test_a_command_is_understood_and_means_the_cluster(entrypoint):
    words = shlex.split(entrypoint)
    words = words[1:] if words[0] == "detr" else [words[2].removeprefix("jobs."), *words[3:]]
    result = CliRunner().invoke(main, [*words, "--print-settings"])
    assert result.exit_code == 0, result.output
    settings = yaml.safe_load(result.stdout)
    assert settings["cluster"]["address"] == "auto" and settings["cluster"]["gpus"] >= 1  # it starts with none
    assert settings["tracking"]["uri"] == "http://mlflow:5000"
    assert words[words.index("--store") + 1].startswith("s3://")


def test_jobs_end_and_cost_no_more_than_told():
    cron = OBJECTS["raycronjob"][0]["spec"]
    assert len(cron["schedule"].split()) == 5
    for spec in (OBJECTS["rayjob"][0]["spec"], cron["jobTemplate"]):
        assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
        assert 0 < spec["activeDeadlineSeconds"] <= 12 * 3600 and spec["backoffLimit"] >= 1


def test_mlflow_is_asked_for_a_password_proxies_artifacts_and_is_understood():
    from mlflow.cli import server

    (deployment,) = [thing for thing in OBJECTS["mlflow"] if thing["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    asked = server.make_context("server", list(container["args"])).params
    assert asked["app_name"] == "basic-auth" and asked["serve_artifacts"]
    assert asked["artifacts_destination"].startswith("s3://") and "*" not in asked["allowed_hosts"]
    assert "mlflow:5000" in asked["allowed_hosts"].split(",")  # as jobs address it

"""What Ray's Prometheus endpoint has of ours, and the dashboard that draws it."""
from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana.json").read_text(encoding="utf-8"))
NO_GPU = {"ray_node_gpus_utilization"}  # of nodes with GPUs; the name is that of Ray 2.60's reporter
FOUND = re.compile(r"^(ray_\w+)\{(.*)\} (\S+)$", re.M)


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_is_whole():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"]) == 8
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__all"} == known
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    for expression in expressions():
        assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")


def test_outside_of_ray_nothing_is_counted_and_nothing_breaks():
    import subprocess
    import sys

    code = "from pipelines.metrics import count_images, took; count_images('train', 3, 1); took('train', 0.1)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.ray
def test_all_that_the_dashboard_draws_is_there(ray_cluster):
    import ray

    @ray.remote(num_cpus=0)
    def work() -> None:
        from pipelines.metrics import count_images, took

        count_images("read", 7, 2)
        count_images("predict", 5)
        took("predict", 0.2)

    ray.get(work.remote())
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    asked = {name for expression in expressions() for name in re.findall(r"ray_\w+", expression)} - NO_GPU
    deadline, names, counted = time.monotonic() + 60, set(), {}
    while (not asked <= names or counted.get(("read", "ok"), 0) < 7) and time.monotonic() < deadline:
        time.sleep(1)
        found = FOUND.findall(urllib.request.urlopen(url, timeout=10).read().decode())
        names = {name for name, _, _ in found}
        ours = [(labels, float(value)) for name, labels, value in found if name == "ray_detr_images_total"]
        counted = {(stage, outcome): sum(value for labels, value in ours
                                         if f'stage="{stage}"' in labels and f'outcome="{outcome}"' in labels)
                   for stage, outcome in (("read", "ok"), ("read", "rejected"), ("predict", "ok"))}  # fmt: skip
    assert asked <= names, asked - names
    # Others of the session may have counted, too.
    assert counted["read", "ok"] >= 7 and counted["read", "rejected"] >= 2 and counted["predict", "ok"] >= 5
    assert all("SessionName=" in labels for labels, _ in ours)

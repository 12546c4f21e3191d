"""cluster.gpus: a command on a cluster that is empty waits for its machines, and leaves nothing that keeps them."""
from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from jobs.common import wait_for_gpus
from pipelines.settings import UserError

ROOT = Path(__file__).parents[2]
SMALL = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
COMMAND = """
import sys, time
import ray
from jobs.common import ray_session
from pipelines.settings import load_settings
with ray_session(load_settings(None, [f"cluster.address={sys.argv[1]}", "cluster.gpus=2"])):
    print("begins with", int(ray.cluster_resources()["GPU"]), flush=True)
    while ray.available_resources().get("GPU") != 2:  # Ray says so a little later
        time.sleep(0.1)
    print("all of them free", flush=True)
"""


def test_a_command_waits_until_the_cluster_has_its_gpus():
    with tempfile.TemporaryDirectory(prefix="ray-") as temp:  # its own: Ray notes there which cluster is the last
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "temp_dir": temp, **SMALL})
        waiting = subprocess.Popen(
            [sys.executable, "-c", COMMAND, cluster.address], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            said = next((line for line in waiting.stderr if "GPUs" in line), "")
            assert "The cluster has 0 of 2 GPUs" in said
            cluster.add_node(num_cpus=1, num_gpus=2, **SMALL)
            said, _ = waiting.communicate(timeout=60)
            assert said.splitlines() == ["begins with 2", "all of them free"]
            assert waiting.returncode == 0
        finally:
            waiting.kill()
            waiting.wait()
            cluster.shutdown()


def test_one_machine_gets_no_more(monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 6.0})
    with pytest.raises(UserError, match="this machine has 0") as refused:
        wait_for_gpus(2, local=True)
    assert refused.value.exit_code == 2

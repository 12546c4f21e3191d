"""A training on a cluster of this machine, of which a node is killed: run by test_training_faults.py.

    python cluster_of_nodes.py SETTINGS DATASET FOLDER move|shrink

move: the only worker's node is killed, and another takes its place. shrink: one of two is killed, the other goes on
alone, and later a new one comes.
"""
from __future__ import annotations

import sys
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.settings import load_settings
from pipelines.tracking import tracker
from pipelines.train import train
from pipelines.training_log import PROGRESS, read_progress


@ray.remote(num_cpus=0, max_retries=0)
def fit(settings_file: str, dataset: str, folder: str) -> dict:
    settings, place = load_settings(settings_file), Path(folder)
    return train(settings, Path(dataset), place, tracker(settings, place.parent, "faults"), "node")


def main(settings_file: str, dataset: str, folder: str, mode: str) -> None:
    def said(kind: str) -> list[dict]:
        return [record for record in read_progress(Path(folder) / PROGRESS) if record["event"] == kind]

    def wait(condition) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            if time.monotonic() > deadline or ray.wait([training], timeout=0)[0]:
                raise SystemExit(f"waited in vain; {ray.get(training, timeout=1)}")
            time.sleep(0.2)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200 * 2**20})
    ray.init(address=cluster.address, log_to_driver=False)
    head = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=200 * 2**20) for _ in range(1 + (mode == "shrink"))]
    training = fit.options(scheduling_strategy=head).remote(settings_file, dataset, folder)
    wait(lambda: len(said("validation")) >= 2)
    if mode == "move":
        cluster.add_node(num_cpus=1, object_store_memory=200 * 2**20)
    cluster.remove_node(nodes[-1], allow_graceful=False)
    if mode == "shrink":
        wait(lambda: said("start")[-1]["workers"] == 1)
        cluster.add_node(num_cpus=1, object_store_memory=200 * 2**20)
    print(ray.get(training))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

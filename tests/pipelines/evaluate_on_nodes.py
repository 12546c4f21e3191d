"""An evaluation on a cluster of two nodes on this machine: run by test_evaluate.py.

    python evaluate_on_nodes.py DATASET CHECKPOINT FOLDER

Each node that an actor starts on leaves an empty file node-ID in FOLDER.
"""
from __future__ import annotations

import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

import pipelines.evaluate
from pipelines.settings import load_settings

SAID = Path(sys.argv[3])


class DetectShard(pipelines.evaluate.DetectShard):
    def __init__(self, *arguments):
        (SAID / f"node-{ray.get_runtime_context().get_node_id()}").touch()
        super().__init__(*arguments)


def main(dataset: str, checkpoint: str, folder: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200 * 2**20})
    for _ in range(2):
        cluster.add_node(num_cpus=3, object_store_memory=200 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False)
    pipelines.evaluate.DetectShard = DetectShard
    settings = load_settings(None, ["evaluate.batch_size=1", "evaluate.resamples=10"])
    pipelines.evaluate.evaluate(settings, Path(dataset), Path(checkpoint), "val", Path(folder))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

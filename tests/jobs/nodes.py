"""A Ray cluster of this machine with nodes that share no disk, run by test_cluster.py.

    python nodes.py FOLDER

The head does no work and asks for a token; each of two nodes keeps its mirrors in FOLDER/node-N. Prints the address,
then obeys lines of its standard input: "kill NAME" takes the node away, without a word, on which a process of that name
runs, and starts another; answers are "killed" and "nobody".
"""
from __future__ import annotations

import socket
import sys
from contextlib import closing, suppress
from itertools import count
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

STORE = {"object_store_memory": 300 * 2**20}


def main(folder: str) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port, **STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    numbers = count(1)

    def add():
        mirrors = {"DETR_CACHE": str(Path(folder) / f"node-{next(numbers)}")}
        return cluster.add_node(num_cpus=3, env_vars=mirrors, **STORE)

    def runs(node, name: str) -> bool:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for child in raylet.children(recursive=True):
            with suppress(psutil.Error):  # it ended meanwhile
                if name in " ".join(child.cmdline()):
                    return True
        return False

    nodes = [add(), add()]
    print(cluster.address, flush=True)
    for line in sys.stdin:
        name = line.split()[1]
        found = next((node for node in nodes if runs(node, name)), None)
        if found is not None:
            cluster.remove_node(found, allow_graceful=False)
            nodes[nodes.index(found)] = add()
        print("killed" if found else "nobody", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])

"""Figures for Ray's Prometheus endpoint, which each node has; deploy/grafana.json draws them.

There they are called ray_detr_images_total and ray_detr_seconds. In a process that is none of Ray's they go nowhere.
"""
from __future__ import annotations

from functools import lru_cache
from typing import Literal

Stage = Literal["ingest", "train", "evaluate", "read", "predict"]  # read: what of predict fetches and decodes
SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


def count_images(stage: Stage, ok: int, rejected: int = 0) -> None:
    """Images that a stage has done with; where it cuts large ones into tiles, each of these counts."""
    for outcome, number in (("ok", ok), ("rejected", rejected)):
        if number and _in_ray():
            _images().inc(number, tags={"stage": stage, "outcome": outcome})


def took(stage: Stage, seconds: float) -> None:
    """What a step of a training took, or a batch of another stage."""
    if _in_ray():
        _seconds().observe(seconds, tags={"stage": stage})


def _in_ray() -> bool:
    import ray

    return ray.is_initialized()


@lru_cache(maxsize=1)
def _images():
    from ray.util.metrics import Counter

    return Counter("detr_images", "images a stage has done with", tag_keys=("stage", "outcome"))


@lru_cache(maxsize=1)
def _seconds():
    from ray.util.metrics import Histogram

    return Histogram("detr_seconds", "seconds of a step or batch", boundaries=SECONDS, tag_keys=("stage",))

"""What the workers of a training tell each other beside gradients. All of them have to call; one alone hears itself."""
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from joblib import cpu_count

from detr.criterion import host_group


def use_machine(workers: int = 1) -> None:
    """All cores, which the workers of a machine share (Ray tells its own one thread each), and TF32 where there is."""
    torch.set_num_threads(max(1, cpu_count() // workers))
    torch.set_float32_matmul_precision("high")


def several() -> bool:
    """Whether this process is one of several workers."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_over_workers(value: Any) -> list[Any]:
    """The value of every worker, in their order, on all of them."""
    if not several():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=host_group())
    return gathered


def sum_over_workers(values: list[int]) -> list[int]:
    """Sums of the workers' numbers."""
    return [sum(numbers) for numbers in zip(*gather_over_workers(values), strict=True)]


def of_first_worker(value: Any) -> Any:
    """The first worker's value."""
    if not several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=host_group())
    return box[0]

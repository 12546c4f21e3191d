"""A step is the same step whichever way it is shared: among workers, or in micro-batches."""
from __future__ import annotations

import copy
import socket
from contextlib import closing

import pytest
import torch
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from detr.criterion import SetCriterion, find_window
from detr.model import DETR
from pipelines.settings import RunSettings, override_settings
from pipelines.train import train_step
from pipelines.workers import gather_over_workers, of_first_worker, sum_over_workers

STEPS, IMAGES = 5, 4
SMALL = {
    "preset": "tiny", "num_classes": 3, "hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 2,
    "dim_feedforward": 32, "num_queries": 6, "backbone": "resnet18", "norm": "frozen",
}  # fmt: skip
FOCAL = {"model": SMALL, "loss": {"mal_gamma": 0}}
SOFTMAX = {
    "model": {**SMALL, "class_loss": "softmax", "two_stage": False},
    "loss": {"class_norm": "window"},
}  # fmt: skip


def run_settings(given: dict, **train) -> RunSettings:
    settings = RunSettings.model_validate(given)
    told = {"lr": 0.01, "lr_backbone": 0.01, **train}
    return override_settings(settings, {f"train.{key}": value for key, value in told.items()})


def make_batch(step: int, first: int, number: int) -> dict[str, torch.Tensor]:
    """Images of a stream; those of the second half are empty at times, at last all of them."""
    counts = [0 if i >= IMAGES // 2 and step % 2 == 0 else 1 + (step + i) % 8 for i in range(first, first + number)]
    images, labels, boxes = [], [], []
    for i, count in enumerate(counts, first):
        rng = torch.Generator().manual_seed(100 * step + i)
        images.append(torch.randint(0, 255, (3, 64, 96), generator=rng, dtype=torch.uint8))
        labels.append(torch.randint(3, (count,), generator=rng))
        boxes.append(0.2 + 0.5 * torch.rand(count, 4, generator=rng))
    return {
        "images": torch.stack(images), "sizes": torch.tensor([[64, 96]] * number), "counts": torch.tensor(counts),
        "labels": torch.cat(labels), "boxes": torch.cat(boxes), "image_ids": torch.arange(number) + first,
        "position": torch.tensor([step * IMAGES + first]),
    }  # fmt: skip


def train_some(settings: RunSettings, mine: list[int], parts: int) -> tuple[list[dict[str, float]], dict]:
    """Losses and weights after STEPS steps, of which this worker computes some parts.

    By gradient descent with momentum: AdamW makes whole steps of what rounding leaves of gradients that are nothing.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = DETR(settings.model)
    net = DistributedDataParallel(model) if torch.distributed.is_initialized() else model
    optimizer = torch.optim.SGD(model.parameter_groups(settings.train.lr, settings.train.lr_backbone), momentum=0.9)
    criterion, size, said = SetCriterion(settings.model, settings.loss), IMAGES // parts, []
    for step in range(STEPS):
        batches = [make_batch(step, part * size, size) for part in mine]
        losses, _ = train_step(net, criterion, optimizer, batches, step, settings)
        said.append({name: float(value) for name, value in losses.items()})
    return said, {name: value.clone() for name, value in model.state_dict().items()}


def one_of(rank: int, given: dict, shares: list[list[int]], parts: int, port: int, out) -> None:
    """A worker in a process of its own."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(shares)
    )
    result = train_some(run_settings(given), shares[rank], parts)
    torch.save(result, f"{out}/{rank}.pt")
    assert gather_over_workers(rank) == list(range(len(shares)))
    assert sum_over_workers([1, rank]) == [len(shares), sum(range(len(shares)))]
    assert of_first_worker(f"said by {rank}") == "said by 0"
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("given", "shares"),
    [(FOCAL, [[0], [1]]), (SOFTMAX, [[0], [1]]), (FOCAL, [[0, 2], [1, 3]]), (FOCAL, [[0, 1, 2], [3]])],
)
def test_many_workers_make_the_steps_of_one(tmp_path, given, shares):
    """Two with half of the images each, empty ones among them, and two that do the parts of missing ones."""
    parts = sum(len(mine) for mine in shares)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(one_of, (given, shares, parts, port, str(tmp_path)), nprocs=len(shares))
    straight, weights = train_some(run_settings(given), [0], 1)
    several = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(shares))]
    for step, expected in enumerate(straight):
        for name in (key for key in expected if key.startswith("loss")):
            mean = sum(said[step].get(name, 0.0) for said, _ in several) / len(shares)
            assert mean == pytest.approx(expected[name], abs=1e-5, rel=1e-5), (step, name)
    assert straight[-1]["loss"] != straight[0]["loss"]
    for name, value in weights.items():
        for _, other in several:
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("given", [FOCAL, SOFTMAX])
@pytest.mark.parametrize("number", [2, 4, 3])
def test_micro_batches_have_the_gradients_of_the_batch(given, number):
    """Of norm 1, by clipping; empty images among them."""

    def gradients(micro_batches: int) -> dict[str, torch.Tensor]:
        settings = run_settings(given, micro_batches=micro_batches)
        torch.manual_seed(0)
        model = DETR(settings.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        train_step(model, SetCriterion(settings.model, settings.loss), optimizer, [make_batch(0, 0, 4)], 0, settings)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, parts = gradients(1), gradients(number)
    assert whole.keys() == parts.keys() and sum(float(g.abs().sum()) for g in whole.values()) > 1
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_the_published_class_loss_weighs_micro_batches_alike():
    """class_norm: device is a mean over each micro-batch, as over each worker's batch."""
    settings = run_settings({**SOFTMAX, "loss": {"class_norm": "device"}})
    model, criterion = DETR(settings.model), SetCriterion(settings.model, settings.loss)
    one, other = make_batch(1, 0, 2), make_batch(0, 2, 2)
    losses = []
    for parts in ([one], [other], [one, other]):
        again = copy.deepcopy(model)
        losses.append(train_step(again, criterion, torch.optim.SGD(again.parameters(), lr=0.0), parts, 0, settings)[0])
    one, other, both = (float(said["loss_ce"]) for said in losses)
    assert both == pytest.approx((one + other) / 2, rel=1e-5)


def test_a_window_counts_what_can_be_matched():
    window = find_window([0, 3, 9], queries=6, parts=2)
    assert window == (12, 3, 9, 9, 2, 1)

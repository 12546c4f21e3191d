"""Matching and losses of all decoder layers, forward and backward: ours, the transformers library's, a plain one.

    python benchmarks/criterion.py --rounds 5
"""
from __future__ import annotations

import json
from typing import Any

import click
import torch
from common import (
    REFERENCE,
    count_host_copies,
    has_transformers,
    machine,
    make_targets,
    median,
    print_table,
    run_rounds,
    shared_options,
    time_calls,
    write_result,
)
from plain import plain_losses
from torch import Tensor

from detr.config import LossConfig, ModelConfig
from detr.criterion import SetCriterion

CASES = {  # images and their numbers of objects
    "batch 2, 7 boxes": [4, 10],
    "batch 16, 20 boxes": [20] * 16,
    "batch 16, 60 boxes": [60] * 16,
}
SIDES = ["ours", "transformers", REFERENCE]


def random_outputs(config: ModelConfig, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the decoder's layers might say: logits [L, B, Q, C + 1] and boxes [L, B, Q, 4], leaves of the graph."""
    generator = torch.Generator().manual_seed(3)
    shape = (config.dec_layers, batch, config.num_queries)
    logits = torch.randn(*shape, config.num_classes + 1, generator=generator)
    boxes = (torch.randn(*shape, 4, generator=generator) - torch.tensor([0.0, 0.0, 1.0, 1.0])).sigmoid()
    return logits.to(device).requires_grad_(), boxes.to(device).requires_grad_()


def prepare_losses(side: str, config: ModelConfig, targets: list[dict[str, Tensor]], device: torch.device):
    """side -> a function of logits and boxes that gives the weighted total and all losses."""
    weights = LossConfig()
    if side == "transformers":
        from library import library_config, library_losses, library_targets

        settings, named = library_config(config), library_targets(targets)
        return lambda logits, boxes: library_losses(logits, boxes, named, settings)
    if side == "ours":
        criterion = SetCriterion(config, weights).to(device)

        def ours(logits: Tensor, boxes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            losses = criterion(by_layer(logits, boxes), targets)
            return criterion.total(losses), losses

        return ours
    return lambda logits, boxes: plain_losses(by_layer(logits, boxes), targets, weights)


def by_layer(logits: Tensor, boxes: Tensor) -> dict:
    """Stacked outputs as the model gives them."""
    *aux, last = ({"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True))
    return {**last, "aux_outputs": aux}


def measure(
    side: str, config: ModelConfig, cases: dict[str, list[int]], device: torch.device, repeats: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """({case: {"seconds", "copies"}}, the losses and gradients of every case)."""
    result, saved = {}, {}
    for case, counts in cases.items():
        targets = make_targets(counts, config.num_classes, device)
        logits, boxes = random_outputs(config, len(counts), device)
        losses_of = prepare_losses(side, config, targets, device)

        def step(losses_of=losses_of, logits=logits, boxes=boxes) -> dict[str, Tensor]:
            logits.grad = boxes.grad = None
            total, losses = losses_of(logits, boxes)
            total.backward()
            return losses

        result[case] = {"seconds": time_calls(step, repeats, device), "copies": count_host_copies(step, device)}
        named = {name: value for name, value in step().items() if name.startswith("loss")}
        saved |= {f"losses/{case}/{name}": value for name, value in named.items()}
        saved |= {f"gradients/{case}/logits": logits.grad, f"gradients/{case}/boxes": boxes.grad}
    return result, saved


@click.command(help=__doc__)
@shared_options
def main(rounds, repeats, device, threads, as_json, side, folder):
    if threads:
        torch.set_num_threads(threads)
    config = ModelConfig()
    if side:
        result, saved = measure(side, config, CASES, torch.device(device), 4 * repeats)
        write_result(folder, result, saved)
        return
    sides = SIDES if has_transformers() else [s for s in SIDES if s != "transformers"]
    results = run_rounds(sides, rounds)
    rows, found = [], {}
    for case in CASES:
        seconds = {name: median(results[name], case, "seconds") for name in sides}
        for name in sides:
            difference = results[name][0]["difference"]
            losses, gradients = (difference[f"{kind}/{case}"] for kind in ("losses", "gradients"))
            copies = results[name][0][case]["copies"]
            ratios = {other: seconds["ours"] / seconds[other] for other in sides}
            found.setdefault(case, {})[name] = {
                "milliseconds": 1000 * seconds[name], "ours_to_this": ratios[name], "host_copies": copies,
                "loss_difference": losses, "gradient_difference": gradients,
            }  # fmt: skip
            rows.append([
                case, name, f"{1000 * seconds[name]:.2f}", "" if name == "ours" else f"{ratios[name]:.3f}",
                str(copies), f"{losses:.1e}", f"{gradients:.1e}",
            ])  # fmt: skip
    if as_json:
        click.echo(json.dumps({"machine": machine(device), "rounds": rounds, "cases": found}))
        return
    print_table(
        f"Criterion with its matcher, forward and backward, 6 layers, 100 queries ({machine(device)})",
        ["case", "side", "ms", "ours / this", "host copies", "losses differ by", "gradients differ by"], rows,
        ["Differences to the plain side: losses absolute, gradients relative by norm.",
         "Host copies of one call: on a CPU those there would be on a device."],
    )  # fmt: skip


if __name__ == "__main__":
    main()

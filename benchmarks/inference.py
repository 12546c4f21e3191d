"""DETR R50 in inference, images to class logits and boxes: ours, the transformers library's, a plain one.

    python benchmarks/inference.py --rounds 3
"""
from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click
import torch
from common import (
    REFERENCE,
    has_transformers,
    machine,
    make_images,
    make_model,
    median,
    print_table,
    run_rounds,
    shared_options,
    time_calls,
    write_result,
)
from plain import PlainDETR
from torch import Tensor

from detr.backbone import fold_norms
from detr.config import ModelConfig

SIDES = [
    "ours, float32, blocks kept",
    "ours, bfloat16, blocks kept",
    "ours, float32",
    "ours, bfloat16",
    "transformers, float32",
    "transformers, float32, blocks kept",
    "transformers, bfloat16",
    "transformers, bfloat16, blocks kept",
    REFERENCE,
]
BATCHES = (1, 4)


def prepare_model(kind: str, config: ModelConfig, device: torch.device) -> Callable[[Tensor, Tensor], tuple]:
    """side -> a function of images and mask that gives logits and boxes."""
    source = make_model(config)
    if kind == "ours":
        model = fold_norms(source).to(device)  # as pipelines.detect.Detector does
        model.backbone.to(memory_format=torch.channels_last)

        def ours(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            outputs = model(images.contiguous(memory_format=torch.channels_last), mask)
            return outputs["pred_logits"], outputs["pred_boxes"]

        return ours
    if kind == "transformers":
        from library import library_model

        library = library_model(source).to(device).eval()
        library.config.auxiliary_loss = False

        def theirs(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            outputs = library(images, pixel_mask=(~mask).long())
            return outputs.logits, outputs.pred_boxes

        return theirs
    plain = PlainDETR(config)
    plain.load_state_dict(source.state_dict())
    plain.to(device).eval()

    def straightforward(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        outputs = plain(images, mask)
        return outputs["pred_logits"], outputs["pred_boxes"]

    return straightforward


@torch.inference_mode()
def measure(
    kind: str, precision: str, config: ModelConfig, size: tuple[int, int], batches: tuple[int, ...],
    device: torch.device, repeats: int,
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """({batch: {"seconds", "spread"}}, the outputs); spread: how far apart the queries' boxes are, in 0..1."""
    detect = prepare_model(kind, config, device)
    result, saved = {}, {}
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        for batch in batches:
            images, mask = (x.to(device) for x in make_images(batch, *size))
            logits, boxes = detect(images, mask)
            seconds = time_calls(lambda images=images, mask=mask: detect(images, mask), repeats, device, warmup=1)
            result[str(batch)] = {"seconds": seconds, "spread": float(boxes.float().std(1).mean())}
            saved |= {f"logits/{batch}/all": logits.float(), f"boxes/{batch}/all": boxes.float()}
    return result, saved


@click.command(help=__doc__)
@shared_options
def main(rounds, repeats, device, threads, as_json, side, folder):
    if threads:
        torch.set_num_threads(threads)
    if side:
        kind, precision = side.split(", ")[:2]
        result, saved = measure(kind, precision, ModelConfig(), (512, 672), BATCHES, torch.device(device), repeats)
        write_result(folder, result, saved)
        return
    sides = SIDES if has_transformers() else [s for s in SIDES if not s.startswith("transformers")]
    results = run_rounds(sides, rounds)
    others = [name for name in ("transformers, float32", REFERENCE) if name in sides]
    found, rows = {}, []
    for batch in map(str, BATCHES):
        seconds = {name: median(results[name], batch, "seconds") for name in sides}
        for name in sides:
            difference = results[name][0]["difference"]
            logits, boxes = (difference[f"{kind}/{batch}"] for kind in ("logits", "boxes"))
            ratios = {other: seconds[name] / seconds[other] for other in others}
            found.setdefault(f"batch {batch}", {})[name] = {
                "seconds": seconds[name], "ratios": ratios, "logit_difference": logits, "box_difference": boxes,
            }  # fmt: skip
            rows.append([
                batch, name, f"{1000 * seconds[name]:.0f}", *(f"{ratios[other]:.2f}" for other in others),
                f"{logits:.1e}", f"{boxes:.1e}",
            ])  # fmt: skip
    spread = median(results[REFERENCE], str(BATCHES[0]), "spread")
    if as_json:
        click.echo(json.dumps({"machine": machine(device), "rounds": rounds, "spread": spread, "batches": found}))
        return
    print_table(
        f"Inference, R50, 512x672 ({machine(device)})",
        ["batch", "side", "ms", *(f"to {other}" for other in others), "logits differ by", "boxes differ by"], rows,
        ["blocks kept: the allocator keeps what it freed (MALLOC_ settings of jobs/common.py), as our jobs run.",
         "Differences to the plain float32 side, at most; boxes in 0..1, where the queries' are "
         f"{spread:.2f} apart (standard deviation)."],
    )  # fmt: skip


if __name__ == "__main__":
    main()

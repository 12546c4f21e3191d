"""One training step of DETR R50, losses after every layer: ours, the transformers library's, a plain one.

    python benchmarks/train_step.py --rounds 3
"""
from __future__ import annotations

import json
import time
from typing import Any

import click
import torch
from common import (
    REFERENCE,
    count_host_copies,
    has_transformers,
    machine,
    make_images,
    make_model,
    make_targets,
    median,
    print_table,
    run_rounds,
    shared_options,
    synchronize,
    time_calls,
    write_result,
)
from plain import PlainDETR, plain_losses
from torch import Tensor, nn

from detr.config import LossConfig, ModelConfig
from detr.criterion import SetCriterion

SIDES = [
    "ours, float32, blocks kept",
    "ours, bfloat16, blocks kept",
    "ours, float32",
    "ours, bfloat16",
    "transformers, float32",
    "transformers, float32, blocks kept",
    "transformers, bfloat16",
    REFERENCE,
]
COMPILED = "ours compiled, float32, blocks kept"
LOG_EVERY = 20  # steps, as in training


class Step:
    """Forward, losses in float32, backward, clipping and AdamW of one side."""

    def __init__(self, kind: str, precision: str, config: ModelConfig, device: torch.device):
        source = make_model(config)
        self.kind, self.bfloat16, self.device = kind, precision == "bfloat16", device
        self.net: nn.Module = source
        if kind.startswith("ours"):
            self.net.backbone.to(memory_format=torch.channels_last)
        elif kind == "transformers":
            from library import library_model

            self.net = library_model(source)
        else:
            self.net = PlainDETR(config)
            self.net.load_state_dict(source.state_dict())
        self.net.to(device)
        self.criterion = SetCriterion(config, LossConfig()).to(device)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, weight_decay=1e-4, fused=kind.startswith("ours"))
        self.call = torch.compile(self.net) if kind == "ours compiled" else self.net
        self.sum, self.steps = torch.zeros((), device=device), 0

    def losses(self, images: Tensor, mask: Tensor, targets: list[dict[str, Tensor]]) -> tuple[Tensor, dict]:
        """(the weighted total, all losses); in evaluation mode of the last layer alone."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            outputs = (self._library_outputs if self.kind == "transformers" else self.call)(images, mask)
        if self.kind == "transformers":
            from library import library_losses, library_targets

            return library_losses(*outputs, library_targets(targets), self.net.config)
        if not self.net.training:
            outputs.pop("aux_outputs")
        if self.kind.startswith("ours"):
            losses = self.criterion(outputs, targets)
            return self.criterion.total(losses), losses
        outputs = {key: [to_float(x) for x in v] if key == "aux_outputs" else v for key, v in outputs.items()}
        return plain_losses(to_float(outputs), targets, LossConfig())

    def _library_outputs(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and boxes of every layer, as the library's forward computes them before its losses."""
        model = self.net
        model.config.auxiliary_loss = model.training  # computes something else with it on
        outputs = model.model(images, pixel_mask=(~mask).long())
        hs = outputs.intermediate_hidden_states if model.training else outputs.last_hidden_state[None]
        return model.class_labels_classifier(hs).float(), model.bbox_predictor(hs).sigmoid().float()

    def __call__(self, images: Tensor, mask: Tensor, targets: list[dict[str, Tensor]]) -> None:
        """A step with its share of logging: ours adds up on the device, the others read every loss."""
        total, losses = self.losses(images, mask, targets)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimizer.step()
        self.steps += 1
        if not self.kind.startswith("ours"):
            for value in losses.values():
                value.item()
            return
        self.sum = self.sum + torch.stack([value.detach().float() for value in losses.values()])
        if self.steps % LOG_EVERY == 0:
            self.sum = torch.tensor(self.sum.tolist(), device=self.device) * 0

    def numbers(self, images: Tensor, mask: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The last layer's total and all its gradients under our names, without dropout."""
        self.net.eval()
        total, _ = self.losses(images, mask, targets)
        total.backward()
        if self.kind == "transformers":
            from library import our_gradients

            gradients = our_gradients(self.net)
        else:
            gradients = {name: p.grad for name, p in self.net.named_parameters() if p.grad is not None}
        found = {f"gradients/{name}": gradient.clone() for name, gradient in gradients.items()}
        self.optimizer.zero_grad(set_to_none=True)
        self.net.train()
        return {"loss/total": total, **found}


def to_float(outputs: dict) -> dict:
    return {key: value.float() if isinstance(value, Tensor) else value for key, value in outputs.items()}


def measure(
    kind: str, precision: str, config: ModelConfig, size: tuple[int, int], batch: int, device: torch.device,
    repeats: int,
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """({"seconds", "copies", "first": seconds of the first step}, the numbers) of one side."""
    step = Step(kind, precision, config, device)
    images, mask = (x.to(device) for x in make_images(batch, *size))
    if kind.startswith("ours"):
        images = images.contiguous(memory_format=torch.channels_last)
    targets = make_targets([3 + 8 * (i % 2) for i in range(batch)], config.num_classes, device)
    saved = step.numbers(images, mask, targets)
    start = time.perf_counter()
    step(images, mask, targets)
    synchronize(device)
    first = time.perf_counter() - start
    seconds = time_calls(lambda: step(images, mask, targets), repeats, device, warmup=1)
    copies = None
    if kind != "ours compiled":  # the counter would have it compiled anew
        step.steps = LOG_EVERY - 1  # the step that logs
        copies = count_host_copies(lambda: step(images, mask, targets), device)
    return {"seconds": seconds, "copies": copies, "first": first}, saved


@click.command(help=__doc__)
@shared_options
@click.option("--compile", "compiled", is_flag=True, help="A row with torch.compile, too (minutes of compiling).")
def main(rounds, repeats, device, threads, as_json, side, folder, compiled):
    if threads:
        torch.set_num_threads(threads)
    if side:
        kind, precision = side.split(", ")[:2]
        result, saved = measure(kind, precision, ModelConfig(), (512, 672), 2, torch.device(device), repeats)
        write_result(folder, result, saved)
        return
    sides = [*SIDES, COMPILED] if compiled else SIDES
    if not has_transformers():
        sides = [s for s in sides if not s.startswith("transformers")]
    results = run_rounds(sides, rounds)
    seconds = {name: median(results[name], "seconds") for name in sides}
    others = [name for name in ("transformers, float32", REFERENCE) if name in sides]
    found, rows = {}, []
    for name in sides:
        difference = results[name][0]["difference"]
        ratios = {other: seconds[name] / seconds[other] for other in others}
        found[name] = {
            "seconds": seconds[name], "first_seconds": median(results[name], "first"),
            "ratios": ratios, "host_copies": results[name][0]["copies"],
            "loss_difference": difference["loss"], "gradient_difference": difference["gradients"],
        }  # fmt: skip
        rows.append([
            name, f"{seconds[name]:.3f}", *(f"{ratios[other]:.2f}" for other in others),
            "" if name == COMPILED else str(results[name][0]["copies"]),
            f"{difference['loss']:.1e}", f"{difference['gradients']:.1e}",
        ])  # fmt: skip
    if as_json:
        click.echo(json.dumps({"machine": machine(device), "rounds": rounds, "sides": found}))
        return
    notes = [
        "blocks kept: the allocator keeps what it freed (MALLOC_ settings of jobs/common.py), as our training runs.",
        "Differences to the plain float32 side, without dropout, of the last layer alone (the library's auxiliary "
        "loss off): the loss absolute, gradients relative by norm.",
        "Host copies of the step that logs: on a CPU those there would be on a device.",
    ]
    if compiled:
        notes.append(f"First compiled step: {found[COMPILED]['first_seconds']:.0f} s, nearly all of it compiling.")
    print_table(
        f"Training step, R50, 512x672, batch 2 ({machine(device)})",
        ["side", "s", *(f"to {other}" for other in others), "host copies", "loss differs by", "gradients differ by"],
        rows, notes,
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""What the benchmarks share: every side in a fresh process, interleaved rounds, medians, one table; equal weights."""
from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops.misc import FrozenBatchNorm2d

from detr.config import ModelConfig
from detr.model import DETR
from jobs.common import KEEP_BLOCKS

REFERENCE = "plain, float32"  # the side to which numbers are compared


def has_transformers() -> bool:
    """Whether the transformers library is installed; a printed sentence if not."""
    found = importlib.util.find_spec("transformers") is not None
    if not found:
        click.echo("transformers is not installed (pip install '.[bench]'): its rows are left out.", err=True)
    return found


def shared_options(function: Callable) -> Callable:
    for option in reversed([
        click.option("--rounds", default=5, show_default=True, help="Every side once per round, in a fresh process."),
        click.option("--repeats", default=5, show_default=True, help="Timed calls per process; their median counts."),
        process_options,
    ]):  # fmt: skip
        function = option(function)
    return function


def process_options(function: Callable) -> Callable:
    for option in reversed([
        click.option("--device", default="cpu", show_default=True, help="cpu or cuda."),
        click.option("--threads", type=int, help="PyTorch's threads; its own choice by default."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON."),
        click.option("--side", hidden=True, help="Measure this side in this process and write to --folder."),
        click.option("--folder", type=Path, hidden=True),
    ]):  # fmt: skip
        function = option(function)
    return function


def run_rounds(sides: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """This script again as `--side NAME` for every side in every round -> per side the rounds' results.

    A side named "..., blocks kept" runs with the allocator's settings that jobs/common.py gives to workers, any
    other with the system's own. What a side saved in the first round is compared with what REFERENCE did.
    """
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as place:
        for number in range(rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                click.echo(f"round {number + 1} of {rounds}: {side}", err=True)
                folder = Path(place) / str(number) / side
                results[side].append(run_side(side, folder, side.endswith("blocks kept")))
            if number == 0:
                files = {side: Path(place) / "0" / side / "saved.safetensors" for side in sides}
                for side, file in files.items():
                    results[side][0]["difference"] = differences(file, files[REFERENCE])
                for file in files.values():
                    file.unlink()
    return results


def run_side(side: str, folder: Path, keep_blocks: bool, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """This script again as `--side NAME` in a fresh process, and whatever other arguments -> its result.

    keep_blocks: with the allocator's settings that jobs/common.py gives to workers, else with the system's own.
    """
    own = {key: value for key, value in os.environ.items() if key not in KEEP_BLOCKS}
    folder.mkdir(parents=True)
    subprocess.run(
        [sys.executable, *sys.argv, *arguments, "--side", side, "--folder", str(folder)],
        env=own | KEEP_BLOCKS if keep_blocks else own, check=True, stdout=sys.stderr,
    )  # fmt: skip
    return json.loads((folder / "result.json").read_text())


def write_result(folder: Path, result: dict[str, Any], saved: dict[str, Tensor] | None) -> None:
    """What one side measured, and the tensors it computed, for `run_rounds`."""
    if saved is not None:
        saved = {key: value.detach().cpu().contiguous() for key, value in saved.items()}
        save_file(saved, folder / "saved.safetensors")
    (folder / "result.json").write_text(json.dumps(result))


def differences(path: Path, reference: Path) -> dict[str, float]:
    """Two files of tensors -> how far they are apart, for every kind (the name up to the last slash).

    The largest difference; of gradients the norm of the difference of all, relative to the norm of the reference's.
    """
    own, truth = load_file(path), load_file(reference)
    if own.keys() != truth.keys():
        raise ValueError(f"the sides computed different things: {sorted(own.keys() ^ truth.keys())[:5]}")
    kinds: dict[str, list[str]] = {}
    for key in own:
        kinds.setdefault(key.rpartition("/")[0], []).append(key)
    found = {}
    for kind, keys in kinds.items():
        apart = [own[key].double() - truth[key].double() for key in keys]
        if kind.startswith("gradients"):
            square = sum(float(x.square().sum()) for x in apart)
            found[kind] = math.sqrt(square / sum(float(truth[key].double().square().sum()) for key in keys))
        else:
            found[kind] = max(float(x.abs().max()) for x in apart)
    return found


def median(results: list[dict[str, Any]], *keys: str) -> float:
    """The median over rounds of one figure in their results."""
    values = []
    for result in results:
        for key in keys:
            result = result[key]
        values.append(result)
    return statistics.median(values)


def time_calls(call: Callable[[], Any], repeats: int, device: torch.device, warmup: int = 2) -> float:
    """The median seconds of a call, waiting for the device."""
    seconds = []
    for i in range(warmup + repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        if i >= warmup:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class HostCopies(TorchFunctionMode):
    """Counts what would be a copy from device to host if the tensors were on a device.

    That is .cpu() and .tolist(), a number read from a tensor (item, float, bool), and what must know how many
    elements are true: nonzero, and indexing with a bool.
    """

    def __init__(self):
        super().__init__()
        self.count = 0
        self.below = _Dispatched(self)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.cpu, torch.Tensor.tolist):
            self.count += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.below.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.below.__exit__(*error)


class _Dispatched(TorchDispatchMode):
    def __init__(self, counter: HostCopies):
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.counter.count += 1
        elif name in ("index", "index_put", "index_put_"):
            self.counter.count += any(i is not None and i.dtype == torch.bool for i in args[1])
        return function(*args, **(kwargs or {}))


def count_host_copies(call: Callable[[], Any], device: torch.device) -> int:
    """Copies from device to host in one call: on a GPU those the profiler saw, on a CPU those there would be."""
    if device.type == "cpu":
        with HostCopies() as copies:
            call()
        return copies.count
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        synchronize(device)
    return sum("DtoH" in event.name for event in profile.events())


def make_model(config: ModelConfig) -> DETR:
    """Random weights, the same in every process, that tell queries and places apart.

    As initialised, a stack this deep gives every query the same box, and a mistake would not show.
    """
    torch.manual_seed(0)
    model = DETR(config)
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            last = name.endswith(("bn3", "downsample.1"))  # small on the residual path, so that nothing explodes
            nn.init.uniform_(module.weight, *((0.3, 0.5) if last else (0.8, 1.2)))
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
        elif name.endswith(("self_attn", "multihead_attn")):
            nn.init.normal_(module.in_proj_bias, std=0.1)
            with torch.no_grad():  # attention that chooses; the encoder's must not make all places alike
                module.in_proj_weight[: 2 * config.hidden_dim] *= 3
                module.out_proj.weight *= 0.5 if "encoder" in name else 3
    nn.init.normal_(model.input_proj.weight, std=0.1)
    with torch.no_grad():  # what all places have in common is not to drown what they differ in
        model.input_proj.weight -= model.input_proj.weight.mean(1, keepdim=True)
    nn.init.normal_(model.bbox_embed.layers[-1].weight, std=0.6)
    nn.init.normal_(model.class_embed.weight, std=0.2)
    return model


def make_images(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Random images with some structure [B, 3, H, W] and their mask; every second one is padded."""
    generator = torch.Generator().manual_seed(1)
    images = torch.zeros(batch, 3, height, width)
    for cell in (8, 32, 128):
        coarse = torch.randn(batch, 3, -(-height // cell), -(-width // cell), generator=generator)
        images += nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    mask[1::2, :, width * 7 // 8 :] = True
    mask[1::2, height * 7 // 8 :] = True
    return images.masked_fill(mask[:, None], 0.0), mask


def make_targets(counts: list[int], num_classes: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Random labels and boxes (cxcywh in 0..1) of images with so many objects."""
    generator = torch.Generator().manual_seed(2)
    targets = []
    for count in counts:
        size = 0.05 + 0.4 * torch.rand(count, 2, generator=generator)
        centre = size / 2 + (1 - size) * torch.rand(count, 2, generator=generator)
        labels = torch.randint(num_classes, (count,), generator=generator)
        targets.append({"labels": labels.to(device), "boxes": torch.cat([centre, size], 1).to(device)})
    return targets


def print_table(title: str, columns: list[str], rows: list[list[str]], notes: list[str]) -> None:
    """A table and what must be known to read it."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


def machine(device: str) -> str:
    """Where the figures come from."""
    name = torch.cuda.get_device_name() if device != "cpu" else f"{os.cpu_count()} CPU cores"
    return f"{name}, PyTorch {torch.__version__}, load {os.getloadavg()[0]:.1f}"

"""The training loop, on one worker or many (Ray Train), streamed from shards and tracked in MLflow.

The driver (`train`) starts the workers and follows their progress file; each worker runs `train_loop`. What
decides anything (budget in minutes, best checkpoint) decides at fixed steps, so that an interrupted run ends
as a straight one does.
"""
from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from joblib import cpu_count
from torch import Tensor

from detr.batch import normalise
from detr.checkpoint import CheckpointError, init_from, load_backbone, save_checkpoint
from detr.criterion import SetCriterion
from detr.matcher import NonFiniteOutputs
from detr.model import DETR, count_parameters
from detr.optimizer import MuonAdamW, build_optimizer
from detr.queries import make_denoising_queries
from pipelines.budget import Budget, lr_factor, of_first_worker, sum_over_workers
from pipelines.detect import Detector
from pipelines.evaluate import check_ids, coco_metrics, coco_truth, detect_rows, detections_to_coco
from pipelines.feed import Arrivals, Feed, first_model, open_feed
from pipelines.fit import fit_to_data
from pipelines.progress import console, duration, progress
from pipelines.settings import RunSettings, TrainSettings, UserError, override_settings
from pipelines.shards import read_split, split_shards
from pipelines.stage import read_json, write_json
from pipelines.storage import fetch, filesystem
from pipelines.tracking import Tracker

LOG_EVERY = 20  # steps
PROGRESS = "progress.jsonl"


def train(
    settings: RunSettings,
    dataset_folder: Path,
    folder: Path,
    tracker: Tracker,
    name: str,
    tags: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Train on the split "train" of a dataset, choose the best checkpoint on "val", and leave it in folder.

    Called again with the same folder it goes on from the last checkpoint, in the same MLflow run.
    Returns {"checkpoint", "history" (paths in folder), "steps", "AP", "AP50", "best_step", "run_id",
    "stopped_early", "images_per_second", "parameters"}. Raises UserError where the training cannot start or ends in a
    way the user can mend.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    folder = Path(folder).resolve()
    dataset = read_json(dataset_folder / "dataset.json")
    settings, fitted = fit_to_data(find_weights(settings), dataset_folder)
    if fitted:
        console.print(f"Fitted to the data: {'; '.join(fitted)}.")
    use_gpu = uses_gpu(settings)
    run_file = folder / "run.json"
    run_id = read_json(run_file)["run_id"] if run_file.is_file() else None
    run_id = tracker.start_run(name, run_id, tags)
    write_json(run_file, {"format": 1, "run_id": run_id})
    tracker.log_params(run_id, settings.model_dump(mode="json"))
    for split, context in (("train", "training"), ("val", "validation")):
        record = dataset["splits"][split]
        tracker.log_dataset(run_id, f"{dataset['name']}-{split}", record["digest"], context, dataset["source"])

    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "settings": settings.model_dump(mode="json"),
            "dataset": str(Path(dataset_folder).resolve()),
            "folder": str(folder),
            "tracker": tracker,
            "run_id": run_id,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.train.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"GPU": 1, "CPU": 1} if use_gpu else {"CPU": 1},
        ),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=str(folder / "ray"),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="AP", checkpoint_score_order="max"
            ),
            failure_config=ray.train.FailureConfig(max_failures=2),
        ),
    )
    status = "FAILED"
    try:
        with _Follower(folder / PROGRESS, name):
            result = trainer.fit()
        if result.error is not None:
            raise result.error
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except ray.train.TrainingFailedError as error:
        raise _explain(error) from error
    finally:
        tracker.end_run(run_id, status)

    summary = result.return_value
    if summary["stopped_early"]:
        console.print(f"  Stopped at step {summary['steps']}: no better AP in {settings.train.patience} validations.")
    best = max(result.best_checkpoints, key=lambda pair: (pair[1]["AP"], pair[1]["step"]))[0]
    with best.as_directory() as place:
        part = folder / ".checkpoint"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(Path(place) / "model", part)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        os.replace(part, folder / "checkpoint")
    tracker.log_file(run_id, folder / "checkpoint", "checkpoint")
    write_json(folder / "history.json", read_history(folder / PROGRESS))
    tracker.log_file(run_id, folder / "history.json")
    return {"checkpoint": "checkpoint", "history": "history.json", "run_id": run_id, **summary}


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs; the first worker's return value is the summary."""
    import ray.train
    import ray.train.torch

    settings = RunSettings.model_validate(config["settings"])
    options, folder, dataset_folder = settings.train, Path(config["folder"]), Path(config["dataset"])
    dataset = read_json(dataset_folder / "dataset.json")
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    beside = context.get_local_world_size()  # workers on this machine, itself one
    use_machine(beside)

    model, ema, criterion, optimizer, messages = set_up(settings, [c["name"] for c in dataset["categories"]], device)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    net: torch.nn.Module = model
    if workers > 1:
        net = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    feed = open_feed(
        dataset_folder, "train", settings.model, options.augment, settings.ingest.max_pixels, options.batch_size,
        settings.seed, rank, workers, first_model(settings.model, options),
        preparing=max(1, (cpu_count() // beside - 1) if device.type == "cuda" else cpu_count() // beside // 2),
    )  # fmt: skip
    state: dict[str, Any] = {"step": 0, "best_AP": -1.0, "best_AP50": 0.0, "best_step": 0, "stale": 0}
    torch.manual_seed(settings.seed * 1000 + rank)  # dropout differs between workers, weights do not
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as place:
            saved = torch.load(Path(place) / "state.pt", map_location=device, weights_only=True)
        state = saved["progress"]
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"].cpu())
    log = _Log(folder / PROGRESS, config["tracker"], config["run_id"], rank == 0)
    log.start(state["step"], messages, count_parameters(model), workers, feed)

    budget = Budget(options, feed, folder, state.get("budget"))
    state["budget"] = budget.state
    arrivals = Arrivals(feed, state["step"])
    batches = feed.stream(state["step"], budget.last_step, lambda: budget.full_from)
    try:
        while not budget.is_spent(state["step"]) and not _is_stale(state, options):
            step = state["step"]
            budget.start()
            batch = {
                k: v if k in ("counts", "image_ids") else v.to(device, non_blocking=True)  # those are read here
                for k, v in next(batches).items()
            }
            factor = lr_factor(step, budget.share(step), options)
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * factor
            losses, norm = train_step(net, criterion, optimizer, batch, step, settings, rank)
            update_average(ema, model, options.ema_decay)
            for epoch in arrivals.add(step, batch, sum_over_workers):
                log.epoch(step + 1, epoch)
            state["step"] = step = step + 1
            budget.tick(step)
            rate, images = optimizer.param_groups[0]["lr"], options.batch_size * workers
            log.step(step, budget.steps, budget.share(step), losses, norm, rate, images)
            if budget.validation_is_due(step):
                with log.paused():
                    metrics = {"AP": 0.0, "AP50": 0.0}
                    if rank == 0:
                        size = settings.evaluate.batch_size
                        detector = Detector(ema.module, dataset["categories"], batch_size=size, device=device)
                        metrics = validate(detector, dataset, dataset_folder, settings)
                        log.validation(step, metrics)
                        first = step <= budget.full_from  # AP is of full size, which it has not seen yet
                        better = first or metrics["AP"] > state["best_AP"]
                        state["stale"] = 0 if better else state["stale"] + 1
                        if metrics["AP"] >= state["best_AP"]:
                            state |= {"best_AP": metrics["AP"], "best_AP50": metrics["AP50"], "best_step": step}
                    if options.patience:
                        state["stale"] = of_first_worker(state["stale"])
                    _report(rank, model, ema, optimizer, state, metrics, dataset, settings)
    finally:
        batches.close()
    return {
        "steps": state["step"],
        "epochs": round(state["step"] / feed.steps_per_epoch(), 2),
        "AP": state["best_AP"],
        "AP50": state["best_AP50"],
        "best_step": state["best_step"],
        "stopped_early": _is_stale(state, options) and not budget.is_spent(state["step"]),
        "images_per_second": log.images_per_second(),
        "parameters": count_parameters(model)[0],
    }


def uses_gpu(settings: RunSettings) -> bool:
    """Whether workers train on GPUs: as told, else where the Ray cluster has some."""
    import ray

    return settings.train.use_gpu if settings.train.use_gpu is not None else ray.cluster_resources().get("GPU", 0) > 0


def use_machine(workers: int = 1) -> None:
    """All cores, which the workers of a machine share (Ray tells its own one thread each), and TF32 where there is."""
    torch.set_num_threads(max(1, cpu_count() // workers))
    torch.set_float32_matmul_precision("high")


def set_up(
    settings: RunSettings, class_names: list[str], device: torch.device
) -> tuple[DETR, torch.optim.swa_utils.AveragedModel, SetCriterion, torch.optim.AdamW | MuonAdamW, list[str]]:
    """The model at its start, its moving average, its criterion, its optimiser, and what weights were taken.

    Raises UserError as `load_initial_weights`.
    """
    options = settings.train
    torch.manual_seed(settings.seed)
    model = DETR(settings.model)
    weight = next(model.backbone.parameters())
    fresh = weight.clone()
    messages = load_initial_weights(model, options, class_names)
    rate = options.backbone_rate(trained=not torch.equal(weight, fresh))  # a backbone is taken as a whole or not
    model.to(device)
    model.backbone.to(memory_format=torch.channels_last)
    criterion = SetCriterion(settings.model, settings.loss).to(device)
    ema = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = build_optimizer(model, options.optimizer, options.lr, rate, options.weight_decay)
    return model, ema, criterion, optimizer, messages


def train_step(
    net: torch.nn.Module, criterion: SetCriterion, optimizer: torch.optim.AdamW | MuonAdamW,
    batch: dict[str, Tensor], step: int, settings: RunSettings, rank: int,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """One optimiser step -> (losses, gradient norm), left on the device."""
    options, model = settings.train, settings.model
    images, mask = normalise(batch["images"], batch["sizes"])
    images = images.contiguous(memory_format=torch.channels_last)
    counts = batch["counts"].tolist()
    targets = [
        {"labels": labels, "boxes": boxes}
        for labels, boxes in zip(batch["labels"].split(counts), batch["boxes"].split(counts), strict=True)
    ]
    # A generator of the step's own: the noise does not depend on what came before.
    seed = np.random.SeedSequence((settings.seed, step, rank)).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(seed))
    denoising = make_denoising_queries(targets, model.denoising, model.num_classes, generator)
    net.train()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
        outputs = net(images, mask, denoising)
    try:
        losses = criterion(outputs, targets, denoising)
    except NonFiniteOutputs as error:
        ids = [int(batch["image_ids"][i]) for i in error.images]
        raise UserError(
            f"The model's outputs stopped being finite at step {step}, on the images with ids {ids}; the last good "
            f"checkpoint is kept. Lower train.lr (it is {options.lr:g}) or train.clip_max_norm and start again."
        ) from error
    total = criterion.total(losses)
    net.zero_grad(set_to_none=True)
    total.backward()
    limit = options.clip_max_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], limit)
    optimizer.step()
    return {**losses, "loss": total.detach()}, norm


@torch.inference_mode()
def validate(
    detector: Detector, dataset: dict[str, Any], dataset_folder: Path, settings: RunSettings
) -> dict[str, Any]:
    """COCO metrics of a detector on the split "val", every image once."""
    tables = []
    for shard in split_shards(dataset_folder, "val"):  # one at a time: the images need not fit in memory together
        images = pq.read_table(shard, columns=["image_id", "file_name", "image"])
        tables.append(detect_rows(detector, images, settings.ingest.max_pixels))
    found = pa.concat_tables(tables)
    rows = read_split(dataset_folder, "val", ["image_id", "file_name", "width", "height", "annotations"])
    check_ids(found["image_id"].to_pylist(), rows["image_id"].to_pylist(), "val")
    metrics = coco_metrics(
        coco_truth(rows, dataset["categories"]), detections_to_coco(found, dataset["categories"]),
        settings.evaluate.max_dets,
    )  # fmt: skip
    # Without any ground truth there is no AP; training goes on and the report says so in words.
    return {**metrics, "AP": metrics["AP"] or 0.0, "AP50": metrics["AP50"] or 0.0}


def find_weights(settings: RunSettings) -> RunSettings:
    """The settings with paths of weights made absolute, since workers run elsewhere; UserError where nothing is."""
    paths = {}
    for key in ("init_from", "backbone_weights"):
        given = getattr(settings.train, key)
        if given and given != "imagenet":
            fs, path = filesystem(given)
            paths[f"train.{key}"] = path if fs.type_name == "local" else given
    return override_settings(settings, paths)


def load_initial_weights(model: DETR, options: TrainSettings, class_names: list[str]) -> list[str]:
    """Weights the user gave, loaded into the model; sentences that say what was taken and what was not.

    Raises UserError when a file cannot be used.
    """
    messages = []
    try:
        with tempfile.TemporaryDirectory() as place:
            if options.backbone_weights:
                given = options.backbone_weights
                messages.append(load_backbone(model, given if given == "imagenet" else fetch(given, Path(place))))
            if options.init_from:
                messages.append(init_from(model, fetch(options.init_from, Path(place)), class_names))
    except CheckpointError as error:
        raise UserError(f"{error}.", 2) from error
    return messages


def _is_stale(state: dict[str, Any], options: TrainSettings) -> bool:
    """Whether AP has not got better for as long as the user has patience."""
    return 0 < options.patience <= state["stale"]


def update_average(ema: torch.optim.swa_utils.AveragedModel, model: torch.nn.Module, decay: float) -> None:
    """Move the average towards the model; its memory is short at the start, so that random weights are soon forgotten.

    Its count is read on the CPU: asked for as a tensor of each weight's device it would be copied back as often.
    """
    count = int(ema.n_averaged)

    def move(averages: list[Tensor], values: list[Tensor], _: Tensor) -> None:
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + count) / (10 + count)))
        else:
            torch._foreach_copy_(averages, values)

    ema.multi_avg_fn = move
    ema.update_parameters(model)


def _report(
    rank: int, model: DETR, ema: torch.optim.swa_utils.AveragedModel, optimizer: torch.optim.AdamW | MuonAdamW,
    state: dict[str, Any], metrics: dict[str, Any], dataset: dict[str, Any], settings: RunSettings,
) -> None:  # fmt: skip
    """Hand Ray Train the metrics and, from the first worker, a checkpoint: state to go on with, and the model."""
    import ray.train

    numbers = {"AP": metrics["AP"], "AP50": metrics["AP50"], "step": state["step"]}
    if rank != 0:
        ray.train.report(numbers)
        return
    with tempfile.TemporaryDirectory() as place:
        torch.save(
            {
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "progress": state,
            },
            Path(place) / "state.pt",
        )
        best = metrics.get("best_f1") or {}
        save_checkpoint(
            Path(place) / "model",
            ema.module,
            dataset["categories"],
            score_threshold=best.get("threshold") or 0.5,
            dataset_digest=dataset["digest"],
            trained={"step": state["step"], "seed": settings.seed, "images_per_step": settings.train.batch_size},
            metrics={k: v for k, v in metrics.items() if k != "precision_recall"},
        )
        ray.train.report(numbers, checkpoint=ray.train.Checkpoint.from_directory(place))


class _Log:
    """Losses, rates and AP to a JSON-lines file and to MLflow, from the first worker."""

    def __init__(self, path: Path, tracker: Tracker, run_id: str, active: bool):
        self.path, self.tracker, self.run_id, self.active = path, tracker, run_id, active
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.since = time.monotonic()
        self.rates: list[float] = []
        self.per_epoch = 1.0

    def start(self, step: int, messages: list[str], parameters: tuple[int, int], workers: int, feed: Feed) -> None:
        self.per_epoch = feed.steps_per_epoch()
        self._write({"event": "start", "step": step, "messages": messages, "parameters": parameters[0],
                     "trainable": parameters[1], "workers": workers, "epoch_images": feed.images})  # fmt: skip

    def step(
        self, step: int, steps: int | None, share: float | None, losses: dict[str, Tensor], norm: Tensor, lr: float,
        images: int,
    ) -> None:  # fmt: skip
        """Add up on the device; one transfer every LOG_EVERY steps."""
        for name, value in {**losses, "grad_norm": norm}.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1
        if step % LOG_EVERY and step != steps:
            return
        values = torch.stack([value.float() for value in self.sums.values()]).cpu() / self.count
        means = dict(zip(self.sums, values.tolist(), strict=True))
        rate = images * self.count / (time.monotonic() - self.since)
        self.rates.append(rate)
        shown = {k: round(v, 5) for k, v in means.items() if k in ("loss", "loss_ce", "loss_bbox", "loss_giou")}
        self._write({"event": "step", "step": step, "steps": steps, "share": share,
                     "epoch": round(step / self.per_epoch, 3), **shown, "lr": lr,
                     "images_per_second": round(rate, 2)})  # fmt: skip
        self._track({**{f"train/{k}": v for k, v in means.items()}, "lr": lr, "images_per_second": rate}, step)
        self.sums, self.count, self.since = {}, 0, time.monotonic()

    def epoch(self, step: int, seen: dict[str, int]) -> None:
        """What came of an epoch that is over."""
        self._write({"event": "epoch", "step": step, **seen})
        self._track({"train/epoch_images": seen["images"], "train/epoch_boxes": seen["boxes"]}, step)

    def validation(self, step: int, metrics: dict[str, Any]) -> None:
        self._write({"event": "validation", "step": step, "AP": metrics["AP"], "AP50": metrics["AP50"]})
        numbers = {f"val/{k}": v for k, v in metrics.items() if k.startswith("A") and v is not None}
        per_class = {f"val/AP/{c['name']}": c["AP"] for c in metrics["per_class"] if c["AP"] is not None}
        self._track({**numbers, **per_class}, step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is no training, and does not count in images per second."""
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began

    def images_per_second(self) -> float:
        return round(float(np.median(self.rates)), 2) if self.rates else 0.0

    def _write(self, record: dict[str, Any]) -> None:
        if self.active:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _track(self, metrics: dict[str, float], step: int) -> None:
        if self.active:
            self.tracker.log_metrics(self.run_id, metrics, step)


def read_progress(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a progress file."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):
                yield json.loads(line)


def read_history(path: Path) -> dict[str, Any]:
    """Steps and validations of a run; those done again after an interruption count once."""
    steps, validations = {}, {}
    for record in read_progress(path):
        kind = record.pop("event")
        if kind == "step":
            steps[record["step"]] = record
        elif kind == "validation":
            validations[record["step"]] = record
    return {
        "format": 1,
        "steps": [steps[k] for k in sorted(steps)],
        "validations": [validations[k] for k in sorted(validations)],
    }


class _Follower:
    """Shows a progress file on stderr while the training runs elsewhere."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.seen = sum(1 for _ in read_progress(self.path))
        self.thread.start()

    def __exit__(self, *error) -> None:
        self.stop.set()
        self.thread.join()

    def _follow(self) -> None:
        with progress() as bar:
            task = bar.add_task("train", total=None, note="starting")
            ap, done, began = "", False, None
            while not done:
                done = self.stop.wait(1.0)
                records = list(read_progress(self.path))
                for record in records[self.seen :]:
                    if record["event"] == "start":
                        began = None
                        went_on = f", going on from step {record['step']}" if record["step"] else ""
                        console.print(
                            f"Training {record['trainable'] / 1e6:.1f} M of {record['parameters'] / 1e6:.1f} M "
                            f"parameters on {record['epoch_images']} images, {record['workers']} worker(s){went_on}."
                        )
                        for message in record["messages"]:
                            console.print(f"  {message}")
                        bar.update(task, completed=record["step"])
                    elif record["event"] == "validation":
                        ap = f"AP {record['AP']:.3f}  "
                        console.print(
                            f"  step {record['step']}: AP {record['AP']:.3f}, AP50 {record['AP50']:.3f} on val"
                        )
                    elif record["event"] == "step":
                        note = f"{ap}loss {record['loss']:.2f}, {record['images_per_second']:.0f} images/s"
                        left, share = None, record["share"]
                        if share is not None:  # by the share: steps may get slower
                            began = began or (time.monotonic(), share)
                            if share > began[1]:
                                left = (time.monotonic() - began[0]) / (share - began[1]) * (1 - share)
                        bar.update(task, completed=record["step"], total=record["steps"], note=note, left=left)
                        if not console.is_terminal and record["step"] % (5 * LOG_EVERY) == 0:
                            of = f" of {record['steps']}" if record["steps"] else ""
                            still = f", {duration(left)} left" if left is not None else ""
                            console.print(f"  step {record['step']}{of}: {note}{still}")
                self.seen = len(records)


def _explain(error: Exception) -> UserError:
    """The sentence of a UserError a worker raised, or the last line of what went wrong."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return cause
            cause = cause.__cause__
    text = str(error).strip().splitlines()
    return UserError(f"The training failed: {text[-1] if text else type(error).__name__}")

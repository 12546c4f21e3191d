"""The training loop, on one worker or many (Ray Train), streamed from shards and tracked in MLflow.

The driver (`train`) starts the workers and follows their progress file; each worker runs `train_loop`. What
decides anything (budget in minutes, best checkpoint) decides at fixed steps, so that an interrupted run ends
as a straight one does. A step is made of as many parts as there are to be workers; where some are missing the
others take their parts, too, so that the number of workers changes nothing but the time it takes.
"""
from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import torch
from joblib import cpu_count
from torch import Tensor

from detr.batch import normalise
from detr.checkpoint import CheckpointError, DownloadError, init_from, load_backbone
from detr.criterion import SetCriterion, Window, find_window
from detr.matcher import NonFiniteOutputs
from detr.memory import recompute_activations
from detr.model import DETR, count_parameters, freeze
from detr.optimizer import MuonAdamW, build_optimizer
from detr.queries import make_denoising_queries
from pipelines.budget import Budget, lr_factor
from pipelines.detect import Detector
from pipelines.feed import Arrivals, first_model, open_feed
from pipelines.fit import fit_to_data
from pipelines.gate import write_trained_on
from pipelines.mirror import at_hand, check_seen, name_of
from pipelines.progress import alongside, console
from pipelines.settings import RunSettings, TrainSettings, UserError, digest, override_settings
from pipelines.shards import flat_values, read_split
from pipelines.stage import read_json, write_json
from pipelines.storage import WORKING, Folder, WholeFiles, fetch, filesystem, join, locate
from pipelines.tracking import Tracker, code_version, environment
from pipelines.training_log import LOG_EVERY, PROGRESS, TrainingLog, follow, read_history
from pipelines.training_state import (
    MODEL,
    Diverged,
    StorageError,
    checkpoint_folder,
    finish_model,
    load_state,
    random_state,
    set_random_state,
    sweep_orphans,
    upload,
)
from pipelines.validation import sample_predictions, validate, validate_checkpoint
from pipelines.workers import gather_over_workers, of_first_worker, several, sum_over_workers, use_machine

LESS_MEMORY = (
    "Raise train.micro_batches, set train.recompute=true, or lower evaluate.batch_size; the training goes on from the "
    "last checkpoint. Or start anew with a lower train.batch_size."
)
STARTS = 30  # times a cluster is asked for its workers, a minute each: it may have to start machines
FAILED = "failed.json"  # what ended the training that the user can mend, said once and not tried again


def train(
    settings: RunSettings,
    dataset_folder: Path,
    folder: Path,
    tracker: Tracker,
    name: str,
    tags: dict[str, str] | None = None,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Train on the split "train" of a dataset, choose the best checkpoint on "val", and leave it in folder.

    Called again with the same folder it goes on from the last checkpoint, in the same MLflow run. callbacks: Ray
    Train's, which hear of every validation and checkpoint.
    Returns {"checkpoint", "history" (paths in folder), "steps", "AP", "AP50", "best_step", "run_id",
    "stopped_early", "images_per_second", "parameters"}. Raises UserError where the training cannot start or ends in a
    way the user can mend.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    folder = Path(folder).resolve()
    dataset = read_json(dataset_folder / "dataset.json")
    check_labels(dataset_folder, dataset)
    settings, fitted = fit_to_data(find_weights(settings), dataset_folder)
    if fitted:
        console.print(f"Fitted to the data: {'; '.join(fitted)}.")
    options, use_gpu = settings.train, uses_gpu(settings)
    check_room(settings, use_gpu)
    check_seen(dataset_folder, folder)
    beside = _validates_beside(settings, use_gpu)
    fs, storage = checkpoint_storage(settings, folder)
    shared = name_of(folder)  # for what workers write, wherever they are
    run_file, run_id = join(shared, "run.json"), None
    with contextlib.suppress(FileNotFoundError):
        run_id = read_json(run_file)["run_id"]
    run_id = tracker.start_run(name, run_id, tags)
    status, model_id = "FAILED", None
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        write_json(run_file, {"format": 1, "run_id": run_id})
        tracker.log_params(run_id, settings.model_dump(mode="json"))
        for split, context in (("train", "training"), ("val", "validation")):
            record = dataset["splits"][split]
            tracker.log_dataset(run_id, f"{dataset['name']}-{split}", record["digest"], context, dataset["source"])
        model_id = tracker.training_model(run_id, name, {"detr.dataset_digest": dataset["digest"]})
        of_val = {"model_id": model_id, "dataset_name": f"{dataset['name']}-val",
                  "dataset_digest": dataset["splits"]["val"]["digest"]}  # fmt: skip
        validation = {
            "settings": settings.model_dump(mode="json"), "dataset_folder": name_of(dataset_folder),
            "log": join(shared, PROGRESS), "tracker": asdict(tracker), "run_id": run_id, "of_val": of_val,
            "device": "cuda" if use_gpu else "cpu",
        }  # fmt: skip
        Folder(shared).delete(FAILED)
        trainer = TorchTrainer(
            train_loop,
            torch_config=_alone() if options.num_workers == 1 else None,
            train_loop_config={
                "settings": settings.model_dump(mode="json"),
                "dataset": name_of(dataset_folder),
                "folder": shared,
                "tracker": tracker,
                "run_id": run_id,
                "of_val": of_val,
                "code": code_version(),  # a worker elsewhere may have no checkout
                "beside": beside,
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=(options.min_workers, options.num_workers) if options.min_workers else options.num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"GPU": 1, "CPU": 1} if use_gpu else {"CPU": 1},
            ),
            run_config=ray.train.RunConfig(
                name="run",
                storage_path=storage,
                storage_filesystem=fs,
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=2, checkpoint_score_attribute="AP", checkpoint_score_order="max"
                ),
                failure_config=ray.train.FailureConfig(
                    max_failures=options.max_failures, controller_failure_limit=STARTS
                ),
                callbacks=list(callbacks),
            ),
            validation_config=ray.train.ValidationConfig(
                fn=validate_checkpoint,
                task_config=ray.train.ValidationTaskConfig(fn_kwargs=validation),
                ray_remote_kwargs={"num_cpus": 1, "num_gpus": int(use_gpu), "max_retries": 3},
            ) if beside else None,
        )  # fmt: skip
        with alongside(follow, join(shared, PROGRESS), options.validations):
            result = trainer.fit()
        if said := _said(shared):
            raise said
        if result.error is not None:
            raise result.error
        summary = _finish(result, folder, settings, validation, (fs, f"{storage}/run"))
        tracker.log_file(run_id, folder / "checkpoint", "checkpoint")
        tracker.log_file(run_id, folder / "history.json")
        tracker.log_metrics(run_id, {"best/AP": summary["AP"]}, model_id=model_id)  # MLflow sorts models by it
        tracker.end_training_model(model_id)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit) as stop:  # Ray leaves by sys.exit when Ctrl-C is pressed
        status = "KILLED"
        raise KeyboardInterrupt from stop
    except ray.train.TrainingFailedError as error:
        raise _explain(error, shared, options.storage) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # which fit replaced for good
        if status == "FAILED" and model_id:
            tracker.end_training_model(model_id, ready=False)
        tracker.end_run(run_id, status)
    return {"checkpoint": "checkpoint", "history": "history.json", "run_id": run_id, **summary}


def _finish(
    result, folder: Path, settings: RunSettings, validation: dict[str, Any], storage: tuple[pafs.FileSystem, str]
) -> dict[str, Any]:
    """Leave the best checkpoint's model and the history in the folder -> the training's summary.

    validation: arguments of `validate_checkpoint`. storage: where Ray Train kept its checkpoints.
    """
    summary = result.return_value
    if summary["stopped_early"]:
        console.print(f"  Stopped at step {summary['steps']}: no better AP in {settings.train.patience} validations.")
    best, found = max(result.best_checkpoints, key=lambda pair: (pair[1]["AP"], pair[1]["step"]))
    if found["AP"] < 0:  # every validation beside the training failed: its last model is judged here, or says why not
        found |= validate_checkpoint(best, **validation)
    with best.as_directory() as place:
        part = folder / ".checkpoint"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(Path(place) / MODEL, part)
        if "metrics" in found:  # of a validation beside the training
            finish_model(part, found["metrics"])
            summary |= {"AP": found["AP"], "AP50": found["AP50"], "best_step": found["step"]}
        write_trained_on(at_hand(validation["dataset_folder"]), part, settings.train.init_from)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        os.replace(part, folder / "checkpoint")
    write_json(folder / "history.json", read_history(join(name_of(folder), PROGRESS)))
    sweep_orphans(*storage)
    return summary


def checkpoint_storage(settings: RunSettings, folder: Path) -> tuple[pafs.FileSystem, str]:
    """Where checkpoints go up while a training runs: its own folder below train.storage, or in `folder`'s store.

    Raises UserError where that cannot be reached.
    """
    given = settings.train.storage
    if given is None:
        fs, place = locate(join(name_of(folder), "ray"), WORKING)
        return (WholeFiles() if fs.type_name == "local" else fs), place
    fs, place = locate(given, WORKING)
    if fs.type_name == "s3":
        filesystem(f"s3://{place.partition('/')[0]}")  # says what is wrong with it, soon
    place = f"{place}/{folder.name}-{digest(str(folder), 8)}"  # a sweep's trials are named by what they try alone
    return (WholeFiles() if fs.type_name == "local" else fs), place


def _validates_beside(settings: RunSettings, use_gpu: bool) -> bool:
    """Whether AP is measured by a task beside the training: as told, else where a GPU is left for it.

    Raises UserError where nothing would be left that is told to do it, so that the training would wait for ever.
    """
    import ray

    told, workers = settings.train.validation, settings.train.num_workers
    kind = "GPU" if use_gpu else "CPU"
    left = ray.cluster_resources().get(kind, 0) > workers
    if told == "beside" and not left:
        raise UserError(f"train.validation=beside needs a {kind} more than there are workers ({workers}).", 2)
    return told == "beside" or (told == "auto" and use_gpu and left)


def _alone():
    """Ray's configuration of PyTorch for one worker: it meets nobody, at no port, which would be open to everybody."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class Alone(TorchConfig):
        backend_cls = Backend

    return Alone()


def check_room(settings: RunSettings, use_gpu: bool) -> None:
    """Raise UserError where the workers would wait for ever; where a cluster may start machines, say what it lacks."""
    import ray

    kind, needed = "GPU" if use_gpu else "CPU", settings.train.min_workers or settings.train.num_workers
    there = int(ray.cluster_resources().get(kind, 0))
    if there >= needed:
        return
    if settings.cluster.address == "local":
        told = "; leave train.use_gpu out to train without" if use_gpu else ""
        raise UserError(
            f"{needed} worker(s) need {needed} {kind}(s), and this machine has {there}. Lower train.num_workers{told}.",
            2,
        )
    console.print(f"{needed} worker(s) need {needed} {kind}(s), and the cluster has {there}: waiting for machines.")


def check_labels(dataset_folder: Path, dataset: dict[str, Any]) -> None:
    """Raise UserError for a label the dataset's label map does not have, which would end the training later on."""
    classes = len(dataset["categories"])
    rows = read_split(dataset_folder, "train", ["file_name", "labels"])
    labels = flat_values(rows["labels"])
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        name, label = next(
            (row["file_name"], label) for row in rows.to_pylist() for label in row["labels"] if not 0 <= label < classes
        )
        raise UserError(
            f"{name} in {dataset_folder} has the label {label}, and the label map ends at {classes - 1}: the shards do "
            "not belong to their dataset.json. Delete the folder and ingest again.", 2,
        )  # fmt: skip


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs; the first worker's return value is the summary."""
    folder = config["folder"]
    if _said(folder):  # started again after what would only happen again
        return {}
    try:
        return _train_loop(config)
    except StorageError:  # the storage may be back soon
        raise
    except Exception as error:
        explained = explain_failure(error, folder, config["settings"]["train"]["storage"])
        if explained is None:
            raise
        told = {"format": 1, "error": str(explained), "exit_code": explained.exit_code,
                "diverged": isinstance(error, Diverged)}  # fmt: skip
        with contextlib.suppress(OSError, UserError):  # the disk may be full, and then it is tried again
            write_json(join(folder, FAILED), told)
        raise explained from error


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    import ray.train
    import ray.train.torch

    settings = RunSettings.model_validate(config["settings"])
    options, folder, dataset_folder = settings.train, config["folder"], at_hand(config["dataset"])
    dataset = read_json(dataset_folder / "dataset.json")
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    near = context.get_local_world_size()  # workers on this machine, itself one
    use_machine(near)

    model, ema, criterion, optimizer, messages = set_up(settings, [c["name"] for c in dataset["categories"]], device)
    compiled = None
    if options.compile:
        from detr.compiling import compile_layers  # which takes seconds to import

        compiled = compile_layers(model)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    net: torch.nn.Module = model
    if workers > 1:
        net = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    feed = open_feed(
        dataset_folder, "train", settings.model, options.augment, settings.ingest.max_pixels, options.batch_size,
        settings.seed, options.num_workers, tuple(range(rank, options.num_workers, workers)),
        first_model(settings.model, options),
        preparing=max(1, (cpu_count() // near - 1) if device.type == "cuda" else cpu_count() // near // 2),
    )  # fmt: skip
    state: dict[str, Any] = {
        "step": 0, "best_AP": -1.0, "best_AP50": 0.0, "best_step": 0, "stale": 0, "validated": 0,
    }  # fmt: skip
    torch.manual_seed(settings.seed * 1000 + rank)  # dropout differs between workers, weights do not
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as place:
            saved = load_state(Path(place))
        state |= saved["progress"]
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        if rank < len(saved["rng"]):
            set_random_state(saved["rng"][rank])
        del saved
    log = TrainingLog(join(folder, PROGRESS), config["tracker"], config["run_id"], config["of_val"], rank == 0)
    if rank == 0:
        config["tracker"].log_environment(config["run_id"], environment() | {"code": config["code"]})
    log.start(state["step"], messages, count_parameters(model), workers, feed)
    if workers < options.num_workers:
        log.say(f"{workers} of {options.num_workers} workers are there; they do the others' parts, too.")

    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) and m.weight.requires_grad]
    if norms and options.num_workers * options.micro_batches > 1:
        seen = math.ceil(options.batch_size / options.micro_batches)
        log.say(f"Batch norms see {seen} images at a time, of one worker.")

    budget = Budget(options, feed, folder, state["step"], state.get("budget"))
    state["budget"] = budget.state
    arrivals = Arrivals(feed, state["step"])
    batches = feed.stream(state["step"], budget.last_step, lambda: budget.full_from)
    said: set[str] = set()
    kept, seconds_between = time.monotonic(), 60 * options.checkpoint_minutes
    with contextlib.ExitStack() as ends:
        ends.callback(batches.close)
        if rank == 0:
            ends.enter_context(config["tracker"].system_metrics(config["run_id"]))
        while not budget.is_spent(state["step"]) and not _is_stale(state, options):
            step = state["step"]
            budget.start()
            parts = [to_device(next(batches), device) for _ in feed.mine]
            factor = lr_factor(step, budget.share(step), options, feed)
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * factor
            losses, norm = train_step(net, criterion, optimizer, parts, step, settings)
            update_average(ema, model, options.ema_decay)
            for epoch in arrivals.add(step, parts, sum_over_workers):
                log.epoch(step + 1, epoch)
            state["step"] = step = step + 1
            budget.tick(step)
            rate, images = optimizer.param_groups[0]["lr"], options.batch_size * options.num_workers
            log.step(step, budget.steps, budget.share(step), losses, norm, rate, images)
            if compiled and step % (5 * LOG_EVERY) == LOG_EVERY and (sentence := compiled()) not in said:
                said.add(sentence)
                log.say(sentence)
            due = budget.validation_is_due(step)
            if due or (step % LOG_EVERY == 0 and of_first_worker(time.monotonic() - kept > seconds_between)):
                with log.paused():
                    state["validated"] += due
                    _even_buffers(model, ema)
                    metrics = None
                    if due and config["beside"]:
                        _learn_of_validations(rank, state, options, budget.full_from)
                    elif due:
                        size = settings.evaluate.batch_size
                        detector = Detector(ema.module, dataset["categories"], batch_size=size, device=device)
                        metrics = validate(detector, dataset, dataset_folder, settings, rank, workers)
                        _count_validation(state, step, metrics, first=step <= budget.full_from)
                        if rank == 0:
                            some = sample_predictions(detector, dataset, dataset_folder, settings)
                            log.validation(step, metrics, some, budget.state["validations"])
                    _keep(rank, model, ema, optimizer, state, metrics, dataset, settings, due and config["beside"])
                    kept = time.monotonic()
    log.finish()
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


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """All of a batch that is not read on the host."""
    host = ("counts", "image_ids", "position")
    return {k: v if k in host else v.to(device, non_blocking=True) for k, v in batch.items()}


def _even_buffers(model: DETR, ema: torch.optim.swa_utils.AveragedModel) -> None:
    """The first worker's running statistics of batch norms, on all workers: each saw its own images."""
    if several():
        for buffer in (*model.buffers(), *ema.module.buffers()):
            torch.distributed.broadcast(buffer, 0)


def _keep(
    rank: int, model: DETR, ema: torch.optim.swa_utils.AveragedModel, optimizer: torch.optim.AdamW | MuonAdamW,
    state: dict[str, Any], metrics: dict[str, Any] | None, dataset: dict[str, Any], settings: RunSettings,
    validate_it: bool,
) -> None:  # fmt: skip
    """Hand Ray Train the metrics and, from the first worker, a checkpoint, which then is stored, verified and known."""
    import ray.train

    numbers = {"step": state["step"], "validated": state["validated"], "AP": -1.0, "AP50": 0.0,  # while not known
               "mark": state["budget"]["validations"]}  # fmt: skip
    if metrics is not None:
        numbers |= {"AP": metrics["AP"], "AP50": metrics["AP50"]}
    rng = gather_over_workers(random_state())
    if rank != 0:
        ray.train.report(numbers)
        return
    with checkpoint_folder(model, ema, optimizer, rng, state, metrics, dataset, settings) as place:
        made = ray.train.Checkpoint.from_directory(place)
        ray.train.report(numbers, checkpoint=made, checkpoint_upload_fn=upload, validation=validate_it)
    # It lies in storage; but only when the controller has noted it, too, will a restart find it.
    ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)


def _count_validation(state: dict[str, Any], step: int, metrics: dict[str, Any], first: bool) -> None:
    """Note a validation, and how many there were since AP got better.

    first: AP is of images at full size, which the model has not seen yet; so it cannot have got worse.
    """
    better = first or metrics["AP"] > state["best_AP"]
    state["stale"] = 0 if better else state["stale"] + 1
    if metrics["AP"] >= state["best_AP"]:
        state |= {"best_AP": metrics["AP"], "best_AP50": metrics["AP50"], "best_step": step}


def _learn_of_validations(rank: int, state: dict[str, Any], options: TrainSettings, full_from: int) -> None:
    """Where somebody has patience: await the validations beside the training up to the one before this.

    Those up to step full_from do not count, as in `_count_validation`.
    """
    import ray.train

    if not options.patience:
        return
    stale = 0
    if rank == 0:
        known = [found.metrics for found in ray.train.get_all_reported_checkpoints()]
        known = [metrics for metrics in known if metrics["AP"] >= 0 and metrics["step"] > full_from]
        if known:
            stale = state["validated"] - 1 - max(known, key=lambda metrics: metrics["AP"])["validated"]
    state["stale"] = of_first_worker(stale)


def uses_gpu(settings: RunSettings) -> bool:
    """Whether workers train on GPUs: as told, else where the Ray cluster has some."""
    import ray

    return settings.train.use_gpu if settings.train.use_gpu is not None else ray.cluster_resources().get("GPU", 0) > 0


def set_up(
    settings: RunSettings, class_names: list[str], device: torch.device
) -> tuple[DETR, torch.optim.swa_utils.AveragedModel, SetCriterion, torch.optim.AdamW | MuonAdamW, list[str]]:
    """The model at its start, its moving average, its criterion, its optimiser, and what weights were taken.

    Raises UserError as `load_initial_weights`, and for parts to freeze that there are not.
    """
    options = settings.train
    torch.manual_seed(settings.seed)
    model = DETR(settings.model)
    weight = next(model.backbone.parameters())
    fresh = weight.clone()
    messages = load_initial_weights(model, options, class_names)
    rate = options.backbone_rate(trained=not torch.equal(weight, fresh))  # a backbone is taken as a whole or not
    try:
        if options.freeze and (frozen := freeze(model, options.freeze)):
            messages.append(f"frozen: {', '.join(options.freeze)}, {frozen / 1e6:.1f} M parameters")
    except ValueError as error:
        raise UserError(f"train.freeze: {error}.", 2) from error
    if options.recompute:
        recompute_activations(model)
    model.to(device)
    model.backbone.to(memory_format=torch.channels_last)
    criterion = SetCriterion(settings.model, settings.loss).to(device)
    ema = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = build_optimizer(model, options.optimizer, options.lr, rate, options.weight_decay)
    return model, ema, criterion, optimizer, messages


def train_step(
    net: torch.nn.Module, criterion: SetCriterion, optimizer: torch.optim.AdamW | MuonAdamW,
    parts: list[dict[str, Tensor]], step: int, settings: RunSettings,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """One optimiser step on this worker's parts of it -> (losses, gradient norm), left on the device.

    Each part is computed in `train.micro_batches`, one after another. The mean of the workers' losses is that of all
    images at once, and so are the gradients. Raises Diverged for outputs that are not finite.
    """
    options, model = settings.train, settings.model
    parts = [micro for part in parts for micro in _split(part, options.micro_batches)]
    window = find_window([count for part in parts for count in part["counts"].tolist()], model.num_queries, len(parts))
    net.train()
    net.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for number, part in enumerate(parts, 1):
        waits = number < len(parts) and isinstance(net, torch.nn.parallel.DistributedDataParallel)
        with net.no_sync() if waits else contextlib.nullcontext():  # gradients are brought together once
            losses = _losses(net, criterion, part, step, settings, window)
            total = criterion.total(losses)
            total.backward()
        for name, value in {**losses, "loss": total}.items():
            value = value.detach()
            sums[name] = sums[name] + value if name in sums else value
    limit = options.clip_max_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], limit)
    optimizer.step()
    return sums, norm


def _losses(
    net: torch.nn.Module, criterion: SetCriterion, part: dict[str, Tensor], step: int, settings: RunSettings,
    window: Window,
) -> dict[str, Tensor]:  # fmt: skip
    model, options = settings.model, settings.train
    images, mask = normalise(part["images"], part["sizes"])
    images = images.contiguous(memory_format=torch.channels_last)
    counts = part["counts"].tolist()
    targets = [
        {"labels": labels, "boxes": boxes}
        for labels, boxes in zip(part["labels"].split(counts), part["boxes"].split(counts), strict=True)
    ]
    first = int(part["position"])
    noise = (_generator(settings.seed, position) for position in range(first, first + len(counts)))
    denoising = make_denoising_queries(targets, model.denoising, model.num_classes, noise, window.most)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
        outputs = net(images, mask, denoising)
    try:
        return criterion(outputs, targets, denoising, window)
    except NonFiniteOutputs as error:
        ids = [int(part["image_ids"][i]) for i in error.images]
        raise Diverged(
            f"The model's outputs stopped being finite at step {step}, on the images with ids {ids}; the last good "
            f"checkpoint is kept. Lower train.lr (it is {options.lr:g}) or train.clip_max_norm and start again."
        ) from error


def _split(batch: dict[str, Tensor], number: int) -> Iterator[dict[str, Tensor]]:
    """A batch in so many parts of like size, or fewer where it has not as many images."""
    counts = batch["counts"].tolist()
    size = math.ceil(len(counts) / number)
    for start in range(0, len(counts), size):
        images, boxes = slice(start, start + size), slice(sum(counts[:start]), sum(counts[: start + size]))
        yield {
            **{key: batch[key][images] for key in ("images", "sizes", "counts", "image_ids")},
            **{key: batch[key][boxes] for key in ("labels", "boxes")},
            "position": batch["position"] + start,
        }


def _generator(seed: int, position: int) -> torch.Generator:
    """An image's own: its noise does not depend on what came before, nor on what else is in its batch."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, position)).generate_state(1)[0]))


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
        raise UserError(f"{error}.", 1 if isinstance(error, DownloadError) else 2) from error
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


def explain_failure(error: BaseException, folder: Path | str, storage: str | None) -> UserError | None:
    """What ended a training and the user can mend, in a sentence; None for all else.

    folder, storage: where it keeps what it makes, and its checkpoints (train.storage).
    """
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return UserError(f"A worker's memory does not hold what it is to do. {LESS_MEMORY}")
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    written = "PytorchStreamWriter failed" not in text or shutil.disk_usage(tempfile.gettempdir()).free > 2**26
    if full or "No space left" in text or "disk is full" in text or not written:
        places = ", ".join(filter(None, (str(folder), tempfile.gettempdir(), storage)))
        return UserError(
            f"A disk is full (used are {places}); free some space and run the same command: it goes on from the last "
            "checkpoint."
        )
    return None


def _said(folder: str) -> UserError | None:
    """What a worker left in the folder's failed.json."""
    try:
        said = read_json(join(folder, FAILED))
    except FileNotFoundError:
        return None
    return (Diverged if said["diverged"] else UserError)(said["error"], said["exit_code"])


def _explain(error: Exception, folder: str, storage: str | None) -> UserError:
    """The sentence of a UserError a worker raised, or what became of the workers."""
    if said := _said(folder):
        return said
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return cause
            cause = cause.__cause__
    if explained := explain_failure(error, folder, storage):
        return explained
    text = str(error).strip().splitlines()
    if any("died" in str(failure) or "HealthCheck" in type(failure).__name__ for failure in failures.values()):
        return UserError(
            "A training worker died without a word, again and again: most often the system ends it because memory runs "
            f"out. {LESS_MEMORY}"
        )
    return UserError(f"The training failed: {text[-1] if text else type(error).__name__}")

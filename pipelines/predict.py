"""Batch inference: a folder, list or bucket of images -> a Parquet table of detections, on Ray Data.

One image's way: the listing (pipelines/listing.py) freezes its name, a task of its shard (`read_shard`) fetches and
decodes it and puts it into a batch of its shape, a model actor (`DetectBatches`) detects, the driver puts the shard's
rows together and commits them (pipelines/plan.py).
"""
from __future__ import annotations

import hashlib
import random
import socket
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.evaluate import detects_on_gpus, pack, places, unpacked
from pipelines.listing import Listing, find_images
from pipelines.metrics import count_images, took
from pipelines.plan import (
    DETECTIONS,
    Done,
    add,
    begun_plan,
    claim,
    commit,
    commits,
    counts,
    find_commit,
    finish,
    freeze,
    images_of,
    known_images,
    load_manifest,
    refuse_other,
)
from pipelines.progress import progress
from pipelines.settings import RunSettings, UserError, digest
from pipelines.stage import read_json
from pipelines.storage import Folder, from_task, kind, read_listed
from pipelines.tiles import merge, tiles
from pipelines.tracking import Tracker

ROWS = 1  # raised by hand when the rows made of the same plan change
AHEAD, AHEAD_BYTES = 16, 2**28  # images fetched ahead of the one that is decoded, and their size
MOST_BYTES = 2**30  # of a file
MOST_HELD = 2**27  # bytes of decoded images that wait for others of their shape
BLOCK = 2**25  # bytes that go to a model actor at once
WAITING = 2**29  # bytes for each of them that wait in the object store
COMMITTERS = 8  # shards that are written at once
TASK_RETRIES = 4  # of a task whose process died
ROUNDS = 3  # how often a shard is begun whose answers do not fit together

BATCHES = pa.schema(
    [
        ("shard", pa.int32()),
        ("batches", pa.int32()),  # of a shard's last row: how many it has; ELSEWHERE where another driver has done it
        ("status", pa.list_(pa.string())),  # of a shard's last row: of each image, with
        ("widths", pa.list_(pa.int32())),
        ("heights", pa.list_(pa.int32())),
        ("image", pa.list_(pa.int32())),  # of a batch: which images of the shard,
        ("part", pa.list_(pa.list_(pa.int32(), 4))),  # which part of them (x, y, width, height),
        ("sizes", pa.list_(pa.list_(pa.int32(), 2))),  # its height and width in the batch,
        ("shape", pa.list_(pa.int32(), 2)),  # the batch's height and width,
        ("pixels", pa.large_binary()),  # uint8 [B, 3, height, width]
    ]
)
FOUND = pa.schema(
    [
        *[BATCHES.field(name) for name in ("shard", "batches", "status", "widths", "heights", "image", "part")],
        ("counts", pa.list_(pa.int32())),  # detections of each part, all of them one after another in
        ("boxes", pa.list_(pa.float32())),
        ("scores", pa.list_(pa.float32())),
        ("labels", pa.list_(pa.int32())),
    ]
)
ELSEWHERE = -1


def predict(
    settings: RunSettings, input: str, checkpoint: Path, model_name: str, model_version: str, output: str | Path,
    column: str | None = None, tracker: Tracker | None = None,
    session: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Any]:  # fmt: skip
    """Detect on all images of `input` (as `find_images` takes it) that `output` does not have yet.

    output: a folder, local or on S3, laid out as pipelines/plan.py says, for one input, model and kind of settings.
    A run that was stopped is gone on with, as it was planned; then the input is listed again. session: what to run
    Ray in. With a tracker each run is one in MLflow, found again by its plan.

    Returns {"folder", "plan", "runs", and over all runs "images", "ok", "rejected", "rejects": {kind of reason: n},
    "detections": {category name: n}, "scores": [n in each tenth]; "new": the same counts of the runs that this call
    ended, "images_here": those it did itself, "reused_images": all others; "seconds", "images_per_second",
    "cost_per_1000_images" (None without cluster.cost_per_hour), of its own; "score_threshold", "score_thresholds",
    "input_digest", "output_digest", "run_id"}.

    Raises UserError where there is no image, the output is another plan's, a store does not answer, or more than
    `predict.max_reject_fraction` of the table's images cannot be used; what was committed stays. Started again after
    that with the same limit, it lists the images anew, of which some may have been mended.
    """
    folder = Folder(str(output))
    recipe = make_recipe(settings, input, column, checkpoint, model_name, model_version)
    kind(folder.uri)  # a store that does not answer is to be said soon
    refuse_other(folder, recipe)  # before the images are listed, which may take long
    manifest, run_id = load_manifest(folder), None
    new, here, seconds = add({}, counts(DETECTIONS.empty_table())), 0, 0.0
    if tracker is not None and manifest:
        _end_run(tracker, tracker.find_run(_tags(manifest["plan"])), manifest, {})  # a kill may have come before it
    plan, done, again = begun_plan(folder, manifest), None, True
    if plan is not None:
        done = commits(folder, plan)
        if _reasons_to_stop(settings, manifest, plan, done):
            manifest, plan, done = finish(folder, recipe, plan, done, partial=True), None, None
        else:
            again = False  # a run that was killed is to end as one that was not
    for _ in range(1 if again else 2):  # what was begun, and what came since
        plan = plan or _new_plan(settings, folder, recipe, manifest, input, column, again)
        if plan is None:
            break
        if tracker is not None:
            run_id = _start_run(tracker, recipe, plan)
        started = time.monotonic()
        try:
            done = done or commits(folder, plan)
            before = done.total["images"]
            if len(done.shards) < plan["shards"]:
                with session():
                    for found in _detect_plan(settings, folder, manifest, plan, recipe, checkpoint, done, run_id):
                        here += found["images"]
            _stop_for(_reasons_to_stop(settings, manifest, plan, done), folder)
            manifest = finish(folder, recipe, plan, done)
        except BaseException as error:
            if tracker is not None:
                _fail_run(tracker, run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        spent = time.monotonic() - started
        seconds += spent
        of_run = done.total
        add(new, of_run)
        if tracker is not None:
            speed = _speed(settings, plan["images"] - before, spent)
            _end_run(tracker, run_id, manifest, {**speed, "images": of_run["images"],
                                                 "rejected": of_run["images"] - of_run["ok"],
                                                 "detections": of_run["detections"].total()})  # fmt: skip
        plan = done = None
    _stop_for(_reasons_to_stop(settings, manifest, None, Done()), folder)
    shown = ("images", "ok", "rejected", "rejects", "detections", "scores", "score_threshold", "score_thresholds",
             "input_digest", "output_digest", "plan")  # fmt: skip
    return {
        "folder": folder.uri,
        **{key: manifest[key] for key in shown},
        "runs": len(manifest["plans"]),
        "new": {**new, "rejected": new["images"] - new["ok"]},
        "images_here": here,
        "reused_images": max(0, manifest["images"] - here),
        **_speed(settings, here, seconds),
        "run_id": run_id,
    }


def make_recipe(
    settings: RunSettings, input: str, column: str | None, checkpoint: Path, model_name: str, model_version: str
) -> dict[str, Any]:
    """All that makes the rows of a table, besides the images themselves; JSON-like."""
    config = read_json(Path(checkpoint) / "config.json")
    threshold, of_classes = thresholds(settings, config)
    chosen = settings.predict
    return {
        "format": 2,
        "rows": ROWS,
        "input": Folder(input).uri,  # one way to write it
        "column": column,
        "images": settings.data.images if str(input).lower().endswith(".json") else None,  # to which names are relative
        "model": {"name": model_name, "version": str(model_version)},
        "weights_sha256": _sha256(Path(checkpoint) / "model.safetensors"),
        "checkpoint": digest({"model": config["model"], "categories": config["categories"]}),
        "score_threshold": threshold,
        "score_thresholds": of_classes,
        **{key: getattr(chosen, key) for key in ("max_pixels", "batch_size", "images_per_shard", "precision", "compile",
                                                 "tile", "tile_overlap")},
    }  # fmt: skip


def thresholds(settings: RunSettings, config: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The least score, and that of single classes by category id: the one asked for, or a model's config.json's own."""
    asked = settings.predict.score_threshold
    return (config["score_threshold"], config.get("score_thresholds") or {}) if asked is None else (asked, {})


def read_shard(
    batch: pa.Table, *, folder: Folder, plan: dict[str, Any], model: dict[str, Any], recipe: dict[str, Any]
) -> Iterator[pa.Table]:
    """Ray Data task: a shard's number -> its images in batches (BATCHES), and a row with their number and each status.

    A batch is of one shape and of one shard, and which images share it follows from the shard alone.
    """
    from detr.batch import padded_shape, prepare
    from detr.config import ModelConfig
    from detr.transforms import ImageError, decode_image

    config = ModelConfig.model_validate(model)
    for shard in batch["shard"].to_pylist():
        if find_commit(folder, plan, shard):  # of several drivers on one plan
            yield _row(BATCHES, shard=shard, batches=ELSEWHERE)
            continue
        waiting: dict[tuple[int, int], list[tuple[int, tuple, Any]]] = {}
        held = sent = 0
        status, sizes = [], []
        for number, (data, reason) in enumerate(fetched(images_of(folder, plan, shard))):
            parts = []
            if reason is None:
                try:
                    image = decode_image(data, recipe["max_pixels"])
                    for x, y, width, height in _parts(*image.size, recipe):
                        part = image.crop((x, y, x + width, y + height))
                        parts.append(((x, y, width, height), prepare(part, config)))
                except ImageError as error:
                    reason = str(error)
                except MemoryError:
                    raise
                except Exception as error:  # noqa: BLE001 - one odd image is not to end a night's work
                    reason = f"it cannot be used ({type(error).__name__}: {error})"
            status.append(reason or "ok")
            sizes.append((0, 0) if reason else image.size)
            if reason:
                continue
            for (x, y, width, height), pixels in parts:
                shape = padded_shape(config, width, height)
                waiting.setdefault(shape, []).append((number, (x, y, width, height), pixels))
                held += pixels.nbytes
                full = shape if len(waiting[shape]) == recipe["batch_size"] else None
                if full is None and held > MOST_HELD:
                    full = max(waiting, key=lambda one: (len(waiting[one]) * one[0] * one[1], one))
                if full:
                    held -= sum(pixels.nbytes for _, _, pixels in waiting[full])
                    yield _pixels(shard, full, waiting.pop(full))
                    sent += 1
        for shape in sorted(waiting):
            yield _pixels(shard, shape, waiting[shape])
            sent += 1
        count_images("read", 0, sum(reason != "ok" for reason in status))
        widths, heights = zip(*sizes, strict=True)
        yield _row(BATCHES, shard=shard, batches=sent, status=status, widths=widths, heights=heights)


def _parts(width: int, height: int, recipe: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    """What of an image the model is shown (x, y, width, height): all of it, and its tiles."""
    return [(0, 0, width, height), *(tiles(width, height, recipe["tile"], recipe["tile_overlap"])
                                     if recipe["tile"] else [])]  # fmt: skip


class DetectBatches:
    """Ray Data actor: batches of images (BATCHES) -> what is found on them (FOUND).

    checkpoint: a reference to what `evaluate.pack` made; sharing: how many actors share the cores of a machine.
    """

    def __init__(self, checkpoint, device: str, sharing: int, recipe: dict[str, Any]):
        import ray
        import torch
        from joblib import cpu_count

        from pipelines.detect import Detector, label_thresholds

        torch.set_num_threads(max(1, cpu_count() // sharing))  # Ray tells a worker one
        with unpacked(ray.get(checkpoint)) as folder:
            self.detector = Detector.load(
                folder, recipe["batch_size"], device, recipe["precision"], recipe["compile"]
            )
        self.least = label_thresholds(self.detector.categories, recipe["score_threshold"], recipe["score_thresholds"])

    def __call__(self, rows: pa.Table) -> pa.Table:
        return pa.concat_tables([self.detect(rows.slice(at, 1)) for at in range(len(rows))])

    def detect(self, row: pa.Table) -> pa.Table:
        import torch

        known = {name: row[name][0].as_py() for name in BATCHES.names if name != "pixels"}
        passed = {name: known[name] for name in FOUND.names if name in known}
        if known["batches"] is not None:
            return _row(FOUND, **passed)
        began = time.monotonic()
        pixels = np.frombuffer(row["pixels"][0].as_buffer(), np.uint8).reshape(-1, 3, *known["shape"]).copy()
        found = self.detector.detect_batch(
            torch.from_numpy(pixels), torch.tensor(known["sizes"]),
            torch.tensor([[height, width] for _, _, width, height in known["part"]]), self.least,
        )  # fmt: skip
        count_images("predict", len(found))
        took("predict", time.monotonic() - began)
        return _row(
            FOUND, **passed, counts=[len(one["scores"]) for one in found],
            **{key: np.concatenate([one[key] for one in found]).ravel() for key in ("boxes", "scores", "labels")},
        )  # fmt: skip


def assemble(
    images: list[dict[str, Any]], last: dict[str, Any], batches: list[dict[str, Any]],
    categories: list[dict[str, Any]], recipe: dict[str, Any], plan_id: str,
) -> pa.Table | None:  # fmt: skip
    """A shard's images, its last row and its batches (FOUND, as dicts) -> its rows (DETECTIONS), in order of key.

    None unless there is one answer for each image that could be used, and for each of its tiles, and for no other.
    """
    found: list[list[tuple[tuple, dict[str, np.ndarray]]]] = [[] for _ in images]
    if len(last["status"]) != len(images) or any(max(batch["image"]) >= len(images) for batch in batches):
        return None
    for batch in batches:
        ends = np.cumsum(batch["counts"])[:-1]
        boxes = np.split(np.asarray(batch["boxes"], np.float32).reshape(-1, 4), ends)
        scores = np.split(np.asarray(batch["scores"], np.float32), ends)
        labels = np.split(np.asarray(batch["labels"], np.int64), ends)
        for number, part, *one in zip(batch["image"], batch["part"], boxes, scores, labels, strict=True):
            found[number].append((tuple(part), dict(zip(("boxes", "scores", "labels"), one, strict=True))))
    rows = []
    for number, (image, status) in enumerate(zip(images, last["status"], strict=True)):
        expected = _parts(last["widths"][number], last["heights"][number], recipe) if status == "ok" else []
        if sorted(part for part, _ in found[number]) != sorted(expected):
            return None
        row = {
            "image_key": image["key"], "etag": image["etag"], "size": image["size"], "status": status, "boxes": [],
            "scores": [], "category_ids": [], "category_names": [], "model_name": recipe["model"]["name"],
            "model_version": recipe["model"]["version"], "plan_id": plan_id,
        }  # fmt: skip
        if status == "ok":
            width, height = last["widths"][number], last["heights"][number]
            parts = sorted(found[number], key=lambda one: (-one[0][2] * one[0][3], one[0]))  # the whole image first
            one = parts[0][1] if len(parts) == 1 else merge(width, height, parts)
            labels = one["labels"].tolist()
            row |= {
                "width": width,
                "height": height,
                "boxes": one["boxes"].tolist(),
                "scores": one["scores"].tolist(),
                "category_ids": [categories[label]["id"] for label in labels],
                "category_names": [categories[label]["name"] for label in labels],
            }
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=DETECTIONS)


def _new_plan(
    settings: RunSettings, folder: Folder, recipe: dict[str, Any], manifest: dict[str, Any] | None, input: str,
    column: str | None, again: bool,
) -> dict[str, Any] | None:  # fmt: skip
    """List the input, and plan what is new in it; None where nothing is."""
    inside = folder.uri.rstrip("/") + "/"  # pictures that were drawn before are no input
    found = (image for image in find_images(input, settings, column) if not image.uri.startswith(inside))
    with Listing() as listing:
        listing.add(found, str(input))
        claim(folder, recipe)
        if manifest:
            listing.known(known_images(folder, manifest, again))
        number = listing.count()
        if not number and not manifest:  # all of them are the output's own
            raise UserError(f"There is no image in {input} but what lies in {folder.uri}; give other images.", 2)
        if not number:
            return None
        run = len(manifest["plans"]) + 1 if manifest else 1
        with progress() as bar:
            task = bar.add_task("plan", total=number, note="")
            return freeze(folder, run, recipe, listing.images(), lambda rows: bar.advance(task, rows))


def _reasons_to_stop(
    settings: RunSettings, manifest: dict[str, Any] | None, plan: dict[str, Any] | None,
    done: Done,
) -> str | None:  # fmt: skip
    """What is to be said where too many images of the table, with what is done of a plan, were rejected; else None."""
    total = add(add({}, manifest or counts(DETECTIONS.empty_table())), done.total)
    replaced = plan["replaced"] if plan else 0  # at best all of them were rejects
    rejected = total["images"] - total["ok"] - min(replaced, manifest["rejected"] if manifest else 0)
    images = (manifest["images"] - replaced if manifest else 0) + (plan["images"] if plan else 0)
    limit = settings.predict.max_reject_fraction
    if rejected <= limit * images:
        return None
    reason, number = total["rejects"].most_common(1)[0]
    return (
        f"{rejected} of {images} images cannot be used, more than predict.max_reject_fraction {limit} allows; "
        f"{number} because {reason}"
    )


def _stop_for(reasons: str | None, folder: Folder) -> None:
    if reasons:
        raise UserError(
            f"{reasons}. What was done is kept in {folder.uri}: mend the images or raise the limit, and run it again.",
            2,
        )


def _detect_plan(
    settings: RunSettings, folder: Folder, manifest: dict[str, Any] | None, plan: dict[str, Any],
    recipe: dict[str, Any], checkpoint: Path, done: Done, run_id: str | None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Do the shards that are not in `done` and note them there; yields the commits of this driver."""
    categories = read_json(Path(checkpoint) / "config.json")["categories"]
    facts = {"attempt": uuid.uuid4().hex, "host": socket.gethostname(), "run_id": run_id}
    open_shards: dict[int, list[dict[str, Any]]] = {}
    seen: dict[int, set[int]] = {}  # images of the open shards that were detected on
    writing: set[Future] = set()

    def write(last: dict[str, Any], batches: list[dict[str, Any]]) -> tuple[int, dict[str, Any] | None]:
        shard = last["shard"]
        if last["batches"] == ELSEWHERE:
            return shard, find_commit(folder, plan, shard)
        images = images_of(folder, plan, shard)
        table = assemble(images, last, batches, categories, recipe, plan["id"])
        if table is None:
            return shard, None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return shard, commit(folder, plan, shard, images, table, {"finished": now, **facts})

    with progress() as bar, ThreadPoolExecutor(COMMITTERS) as pool:
        task = bar.add_task("predict", total=plan["images"], note=_note(done), completed=done.total["images"])

        def settle(all_of_them: bool) -> Iterator[dict[str, Any]]:
            nonlocal writing
            while writing and (all_of_them or len(writing) >= 2 * COMMITTERS):
                ready, writing = wait(writing, return_when=FIRST_COMPLETED)
                for future in ready:
                    shard, found = future.result()
                    counted = len(seen.pop(shard, ()))
                    if found is None:
                        bar.advance(task, -counted)
                        continue
                    done.take(found)
                    bar.update(task, advance=found["images"] - counted, note=_note(done))
                    if found["images"] > found["ok"]:
                        _stop_for(_reasons_to_stop(settings, manifest, plan, done), folder)
                    if found["attempt"] == facts["attempt"]:
                        yield found

        # A reader that died and was started again may have met other images than before: such a shard is done anew.
        for _ in range(ROUNDS):
            todo = [shard for shard in range(plan["shards"]) if shard not in done.shards]
            if not todo:
                break
            # Drivers that work on one plan by mistake begin at different places, and leave each other what they did.
            turn = random.randrange(len(todo))
            for row in _stream(settings, todo[turn:] + todo[:turn], folder, plan, recipe, checkpoint):
                shard = row["shard"]
                mine = open_shards.setdefault(shard, [])
                mine.append(row)
                arrived = set(row["image"] or ()) - seen.setdefault(shard, set())
                seen[shard] |= arrived
                bar.advance(task, len(arrived))
                last = next((one for one in mine if one["batches"] is not None), None)
                if last and last["batches"] in (ELSEWHERE, len(mine) - 1):
                    batches = [one for one in open_shards.pop(shard) if one["batches"] is None]
                    writing.add(pool.submit(write, last, batches))
                yield from settle(False)
            yield from settle(True)
            for shard in list(open_shards):
                del open_shards[shard]
                bar.advance(task, -len(seen.pop(shard)))
    if len(done.shards) < plan["shards"]:
        lost = [shard for shard in range(plan["shards"]) if shard not in done.shards]
        raise RuntimeError(f"shard {lost[0]} and {len(lost) - 1} more came back without an answer for each image")


def _stream(
    settings: RunSettings, todo: list[int], folder: Folder, plan: dict[str, Any], recipe: dict[str, Any],
    checkpoint: Path,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The Ray part: what is found in the shards (FOUND, as dicts), in any order."""
    import ray
    from joblib import cpu_count
    from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

    from detr.checkpoint import CheckpointError, load_checkpoint

    try:
        load_checkpoint(checkpoint)  # an actor that dies of it says so a minute later and less clearly
    except CheckpointError as error:
        raise UserError(f"{error}.", 2) from error
    use_gpu, cpus = detects_on_gpus(settings), int(ray.cluster_resources().get("CPU", 0))
    there, sharing = places(ray.nodes(), use_gpu)
    actors = settings.predict.actors or min(there, max(1, cpus - 1))
    if actors >= cpus:
        raise UserError(
            f"{actors} model actors leave none of Ray's {cpus} CPUs for reading images; set predict.actors to at most "
            f"{max(1, cpus - 1)}, or give Ray more (cluster.num_cpus).", 2,
        )  # fmt: skip
    local = settings.cluster.address == "local"  # where Ray has more logical CPUs than there are cores
    cores = cpu_count() if local else cpus
    readers = max(1, min(cpus, cores) - actors if use_gpu else cores // 2)
    warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")  # few shards are no mistake
    warnings.filterwarnings("ignore", ".*ray_remote_args_fn.*")  # of 2.64; there is no other way to bound retries yet
    stream = (
        ray.data.from_items([{"shard": shard} for shard in todo], override_num_blocks=len(todo))
        .map_batches(
            read_shard,
            fn_kwargs={"folder": folder, "plan": plan, "recipe": recipe,
                       "model": read_json(Path(checkpoint) / "config.json")["model"]},
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0.9,  # other than the actors', or Ray Data would make one operator of both
            concurrency=readers,
            ray_remote_args_fn=partial(dict, max_retries=TASK_RETRIES),
        )
        .map_batches(
            DetectBatches,
            fn_constructor_args=(ray.put(pack(checkpoint)), "cuda" if use_gpu else "cpu",
                                 max(sharing, -(-actors // there)), recipe),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=max(1, min(actors, len(todo)))),
            num_cpus=1,
            num_gpus=1 if use_gpu else 0,
        )
    )  # fmt: skip
    stream.context.enable_progress_bars = False
    stream.context.target_max_block_size = BLOCK
    # Readers that are faster than the models would fill the object store, by default a third of a machine's memory.
    stream.context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=actors * WAITING)
    try:
        for table in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from table.to_pylist()
    except RayTaskError as error:
        raise from_task(error) or error from error
    except (WorkerCrashedError, OutOfMemoryError) as error:
        raise UserError(
            f"A process that reads images died {TASK_RETRIES + 1} times at one shard ({type(error).__name__}): too "
            "little memory, or an image that breaks its decoder. What was done is kept; run it again with more memory, "
            "or without that image."
        ) from error


def fetched(images: list[dict[str, Any]]) -> Iterator[tuple[bytes | None, str | None]]:
    """Of each image ("uri", "etag", "size") its bytes or why they cannot be had, in order, some read ahead."""

    def fetch(image: dict[str, Any]) -> tuple[bytes | None, str | None]:
        if image["size"] > MOST_BYTES:
            return None, f"the file is larger than {MOST_BYTES >> 20} MiB"
        return read_listed(image["uri"], image["etag"], image["size"])

    ahead: deque[tuple[int, Future]] = deque()
    for image in images:
        while ahead and (len(ahead) == AHEAD or sum(n for n, _ in ahead) + image["size"] > AHEAD_BYTES):
            yield ahead.popleft()[1].result()
        ahead.append((image["size"], _fetchers().submit(fetch, image)))
    while ahead:
        yield ahead.popleft()[1].result()


@lru_cache(maxsize=1)
def _fetchers() -> ThreadPoolExecutor:
    """This process's threads that fetch: new ones for each shard would spread over all of the allocator's arenas."""
    return ThreadPoolExecutor(AHEAD)


def _pixels(shard: int, shape: tuple[int, int], items: list[tuple[int, tuple, Any]]) -> pa.Table:
    """A row of BATCHES: (image, part, uint8 [3, h, w]) of one padded shape."""
    count_images("read", len(items))
    batch = np.zeros((len(items), 3, *shape), np.uint8)
    for slot, (_, _, pixels) in zip(batch, items, strict=True):
        slot[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    ends = pa.py_buffer(np.array([0, batch.nbytes], np.int64))
    column = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(batch)])
    return _row(
        BATCHES, shard=shard, image=[number for number, _, _ in items], part=[part for _, part, _ in items],
        sizes=[pixels.shape[1:] for _, _, pixels in items], shape=shape, pixels=column,
    )  # fmt: skip


def _row(schema: pa.Schema, **values: Any) -> pa.Table:
    """A table of one row; what is not given is null."""
    columns = [
        value if isinstance(value, pa.Array) else pa.array([value], field.type)
        for field, value in ((field, values.get(field.name)) for field in schema)
    ]
    return pa.table(columns, schema=schema)


def _note(done: Done) -> str:
    rejected = done.total["images"] - done.total["ok"]
    return f"{rejected:,} rejected" if rejected else ""


def _speed(settings: RunSettings, images: int, seconds: float) -> dict[str, Any]:
    price = settings.cluster.cost_per_hour
    return {
        "seconds": round(seconds, 2),
        "images_per_second": round(images / seconds, 2) if images else None,
        "cost_per_1000_images": round(price / 3600 * seconds * 1000 / images, 4) if images and price else None,
    }


def _tags(plan_id: str) -> dict[str, str]:
    return {"detr.stage": "predict", "detr.plan": plan_id}


def _start_run(tracker: Tracker, recipe: dict[str, Any], plan: dict[str, Any]) -> str:
    """The plan's run in MLflow, made or gone on with."""
    tags, model = _tags(plan["id"]), recipe["model"]
    run_id = tracker.start_run(f"{model['name']}-predict-{plan['id'][:8]}", tracker.find_run(tags), {
        **tags, "detr.model": f"{model['name']} version {model['version']}", "detr.weights": recipe["weights_sha256"],
        "detr.input_digest": plan["input_digest"],
    })  # fmt: skip
    tracker.log_params(run_id, recipe)
    tracker.log_dataset(run_id, Path(recipe["input"]).name or "images", plan["input_digest"], "prediction",
                        {"uri": recipe["input"]}, {"images": plan["images"]})  # fmt: skip
    return run_id


def _end_run(tracker: Tracker, run_id: str | None, manifest: dict[str, Any], numbers: dict[str, float | None]) -> None:
    """Close the run of the manifest's last plan with what came of it, unless that was done."""
    client = tracker.client()
    if run_id is None or "detr.output_digest" in client.get_run(run_id).data.tags:
        return
    numbers = {**numbers, "images_in_table": manifest["images"], "rejected_in_table": manifest["rejected"]}
    tracker.log_metrics(run_id, {key: value for key, value in numbers.items() if value is not None})
    client.log_dict(run_id, {key: value for key, value in manifest.items() if key not in ("parts", "plans")},
                    "summary.json")  # fmt: skip
    client.set_tag(run_id, "detr.output_digest", manifest["output_digest"])
    client.set_terminated(run_id, "FINISHED")
    tracker.watch_run(run_id, False)


def _fail_run(tracker: Tracker, run_id: str, status: str) -> None:
    """Close a run that was not ended, unless another driver has ended it; what went wrong matters more than MLflow."""
    with suppress(Exception):
        if tracker.client().get_run(run_id).info.status == "FINISHED":
            tracker.watch_run(run_id, False)
        else:
            tracker.end_run(run_id, status)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

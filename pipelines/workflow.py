"""The stages as durable workflow tasks (DBOS).

Every stage is addressed by what goes into it (`pipelines.stage`), so a finished one is found again whether
the ledger remembers it or not. The ledger adds that a killed pipeline is taken up where it stopped.
"""
from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from rich.text import Text

from pipelines.findings import bare
from pipelines.mirror import fetch, name_of, publish, records
from pipelines.progress import console
from pipelines.settings import SAME_MODEL, RunSettings, UserError, digest, override_settings
from pipelines.stage import read_json, run_stage, write_json
from pipelines.storage import is_remote, join, not_done

if TYPE_CHECKING:
    from pipelines.ingest import Source

APPLICATION_VERSION = "2"  # raised when the order or the meaning of the steps changes
# Raised by hand when what a stage makes of the same inputs and settings changes.
VERSIONS = {"sample": 1, "ingest": 3, "sweep": 9, "train": 9, "evaluate": 4, "predict": 3, "report": 7}
GATE_REFUSED = 3

Record = dict[str, Any]


def sample_stage(settings: RunSettings, store: Path) -> Record:
    """The built-in images; the result names their folder."""
    from pipelines.sample import write_sample

    return _stage(store, "sample", settings.sample.model_dump(), {},
                  lambda folder: {**write_sample(settings.sample, folder / "sample"), "folder": "sample"})  # fmt: skip


def data_path(settings: RunSettings, store: Path) -> str:
    """The COCO folder to work on, as Ray's workers find it: the user's, or the built-in one, made if need be."""
    if settings.data.path is not None:
        path = settings.data.path
        return path if "://" in path else str(Path(path).resolve())
    return name_of(Path(sample_stage(settings, store)["folder"]) / "sample")


def find_data(settings: RunSettings, store: Path) -> Callable[[], Record]:
    """Look for the dataset to work on, before Ray is started; what is returned gives its record, where Ray runs.

    Where neither `data` nor `sample` is told anything, it is the one that this store worked on last, and that is said.
    Raises UserError as `source` does.
    """
    from pipelines.ingest import source

    usual = RunSettings()
    last = latest(store, "ingest") if (settings.data, settings.sample) == (usual.data, usual.sample) else None
    if last is None or last["version"] != VERSIONS["ingest"]:
        found = source(settings, data_path(settings, store))
        return lambda: ingest_stage(settings, store, found)
    read = last["finished"][:16].replace("T", " ")
    console.print(f"Without data.path: the last dataset of this store, {last['result']['name']}, as read {read} UTC.")
    return lambda: last


def ingest_stage(settings: RunSettings, store: Path, found: Source) -> Record:
    """Shards of what `source` found; the record's folder holds dataset.json."""
    from pipelines.ingest import ingest

    return _stage(store, "ingest", settings.ingest.model_dump(), found.inputs,
                  lambda folder: ingest(settings, found, folder))  # fmt: skip


def sweep_stage(settings: RunSettings, store: Path, data: Record) -> Record:
    """Trials of other settings; result["best"] holds the changes worth making."""
    from pipelines.sweep import sweep

    name = f"{data['result']['name']}-sweep"
    own = settings.sweep.model_dump(mode="json", exclude={"in_pipeline", "max_concurrent"})
    chosen = {**_training_settings(settings), "sweep": own}

    def work(folder: Path) -> dict[str, Any]:
        _look(settings, data)
        return sweep(settings, Path(data["folder"]), folder, _tracker(settings, store, data), name)

    return _stage(store, "sweep", chosen, _training_inputs(settings, data), work)


def check_training(settings: RunSettings, store: Path) -> None:
    """Raise UserError where the weights to start from or the place of runs cannot be had, before images are read."""
    _weights_inputs(settings)
    check_tracking(settings, store)


def check_tracking(settings: RunSettings, store: Path) -> None:
    """Raise UserError where `tracking.uri` does not answer, or does not know us; one's own file needs no asking."""
    if settings.tracking.uri is not None:
        from pipelines.tracking import tracker

        tracker(settings, store, "")


def train_stage(settings: RunSettings, store: Path, data: Record) -> Record:
    """A trained model; the record's folder holds checkpoint/ and history.json."""
    from pipelines.train import train

    chosen = _training_settings(settings)

    def work(folder: Path) -> dict[str, Any]:
        _look(settings, data)
        name = f"{data['result']['name']}-{folder.name[:8]}"
        return train(settings, Path(data["folder"]), folder, _tracker(settings, store, data), name,
                     {"detr.stage": "train", "detr.key": folder.name})  # fmt: skip

    return _stage(store, "train", chosen, _training_inputs(settings, data), work)


def evaluate_stage(settings: RunSettings, store: Path, data: Record, checkpoint: Path, split: str) -> Record:
    """COCO numbers of a checkpoint on a split."""
    from pipelines.evaluate import evaluate

    dataset = read_json(Path(data["folder"]) / "dataset.json")
    if split not in dataset["splits"]:
        raise UserError(f"The dataset has no split {split!r}; it has {', '.join(dataset['splits'])}.", 2)
    inputs = {**_checkpoint_inputs(checkpoint), "split": split, "split_digest": dataset["splits"][split]["digest"],
              "dataset": dataset["digest"]}  # fmt: skip
    chosen = {"evaluate": settings.evaluate.model_dump(), "max_pixels": settings.ingest.max_pixels,
              "seed": settings.seed}  # fmt: skip
    return _stage(store, "evaluate", chosen, inputs,
                  lambda folder: evaluate(settings, Path(data["folder"]), checkpoint, split, folder))  # fmt: skip


def register_stage(
    settings: RunSettings, store: Path, data: Record, checkpoint: Path, run_id: str, evaluation: Record
) -> Record:
    """A version of the registered model; the registry itself knows a checkpoint it has."""
    from pipelines.registry import register, registered_name

    name = registered_name(settings, data["result"]["name"])
    return _timed(
        "register",
        lambda: register(
            settings, _tracker(settings, store, data), run_id, checkpoint, evaluation["result"],
            data["result"]["digest"], name,
        ),
    )  # fmt: skip


def promote_stage(
    settings: RunSettings, store: Path, data: Record, version: str, evaluation: Record | None, why: str = ""
) -> Record:
    """The gate's verdict, and the alias moved if it passed. Asked anew every time: champions change.

    evaluation: None where the version's files cannot be had, which is a refusal, too.
    """
    from pipelines.compare import compare_evaluations
    from pipelines.gate import rejected_share, seen_in_training
    from pipelines.registry import promote, registered_name

    name = registered_name(settings, data["result"]["name"])
    folder, dataset_folder = Path(store) / "promote" / f"{name}-{version}", Path(data["folder"])
    tracker = _tracker(settings, store, data)
    measured = None
    if evaluation is not None:
        split, seen, base_known = evaluation["result"]["split"], None, True
        with suppress(UserError):  # the gate examines the files itself, and says what is wrong
            place, _, _ = download_model(settings, store, f"models:/{name}/{version}")
            seen, base_known = seen_in_training(place, dataset_folder, split)
        rejected = rejected_share(dataset_folder, split)
        measured = {**evaluation["result"], "data": {"seen": seen, "base_known": base_known, "rejected": rejected}}

    def compare(champion: Path) -> dict[str, Any]:
        other = evaluate_stage(settings, store, data, champion, split)
        found = compare_evaluations(settings, dataset_folder, split, Path(other["folder"]), Path(evaluation["folder"]))
        seen, _ = seen_in_training(champion, dataset_folder, split)
        return {**found, "split": split, "split_digest": other["result"]["split_digest"], "seen_by_first": seen}

    record = _timed(
        "promote",
        lambda: promote(settings, tracker, name, version, measured, compare, folder, Path(store) / "models", why),
    )
    if is_remote(name_of(folder)):
        publish(folder)
    return record


def predict_stage(
    settings: RunSettings, store: Path, images: str, checkpoint: Path, model_name: str, version: str,
    output: str | None = None, column: str | None = None,
    session: Callable[[], AbstractContextManager] = nullcontext,
) -> Record:  # fmt: skip
    """Detections on all images of an input (as `find_images` takes it), in `output` or a folder of the store.

    Those that are there from before stay; the key changes with what is there. session: what to run Ray in.
    """
    from pipelines.drift import drift
    from pipelines.predict import make_recipe, predict
    from pipelines.storage import Folder
    from pipelines.tracking import tracker

    started, output = time.monotonic(), output and Folder(output).uri
    recipe = make_recipe(settings, images, column, checkpoint, model_name, version)
    folder = Path(store).resolve() / "predict" / digest({"recipe": recipe, "output": output})
    before = {record.pop("folder"): record for record in records(Path(store).resolve(), "predict")}
    result = predict(
        settings, images, checkpoint, model_name, version, output or name_of(folder), column,
        tracker(settings, Path(store), model_name), session,
    )  # fmt: skip
    known = before.get(str(folder))
    if known and not result["new"]["images"]:
        same = {key: known["result"].get(key) for key in ("drift", "images_per_second", "cost_per_1000_images")}
        record = {**known, "result": {**result, **same}, "reused": True}
    else:
        record = {
            "format": 1,
            "stage": "predict",
            "version": VERSIONS["predict"],
            "key": digest({"recipe": recipe, "output": result["output_digest"]}),
            "settings": settings.predict.model_dump(),
            "inputs": {**_checkpoint_inputs(checkpoint), "images": result["input_digest"],
                       "model": [model_name, str(version)], "input": recipe["input"], "column": column},
            "result": result,
            "seconds": round(time.monotonic() - started, 2),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        alike = [other for other in before.values() if _way(other) == _way(record) and other["result"]["new"]["images"]]
        last = max(alike, key=lambda other: other["finished"], default=None)
        apart = last and drift(result["new"], last["result"]["new"])
        result["drift"] = apart and {"since": last["finished"], "version": last["inputs"]["model"][1], **apart}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(join(name_of(folder), "stage.json"), record)
        record["reused"] = False
    record["folder"] = str(folder)
    _remember(store, record)
    _say(record)
    return record


def _way(record: Record) -> list[Any]:
    """What two predictions must have in common to be compared: all but the model's version and the images."""
    inputs, result, chosen = record["inputs"], record["result"], record["settings"]
    return [inputs["model"][0], inputs.get("input"), inputs.get("column"), result.get("score_threshold"),
            result.get("score_thresholds"), chosen.get("tile"), chosen.get("precision")]  # fmt: skip


def report_stage(
    settings: RunSettings, store: Path, data: Record, stages: list[Record], training: Record | None,
    evaluations: list[Record], verdict: Record | None, predictions: Record | None,
) -> Record:  # fmt: skip
    """One page about all of it, logged to the training's MLflow run."""
    from pipelines.look import look_at_data
    from pipelines.report import report

    dataset_folder = Path(data["folder"])
    # What the page depends on; how long a stage took does not count, nor who asked the gate again, when, and to be told
    # that what it made champion is champion.
    keys = [[s["stage"], s["key"]] for s in stages if s["stage"] in VERSIONS]
    decided = None
    if verdict:
        said = verdict["result"]
        decided = {key: said.get(key) for key in ("promoted", "version", "champion", "rolled_back", "why")}
        decided["broken"] = [[rule["rule"], rule.get("words")] for rule in said["rules"] if not rule["ok"]]
        decided["comparison"] = said.get("comparison") and digest(said["comparison"])
    inputs = {"stages": keys, "verdict": decided, "settings": settings.model_dump(mode="json")}

    def work(folder: Path) -> dict[str, Any]:
        made = report(
            f"Detection of {data['result']['name']}", dataset_folder, training,
            {e["result"]["split"]: Path(e["folder"]) for e in evaluations},
            Path(training["folder"]) / "history.json" if training else None,
            settings, stages, verdict and verdict["result"], predictions and predictions["result"], folder,
            look_at_data(dataset_folder, settings), _trials(stages),
            Path(training["folder"]) / "checkpoint" if training else None,
        )  # fmt: skip
        if training:
            tracker = _tracker(settings, store, data)
            for path in filter(None, made.values()):
                tracker.log_file(training["result"]["run_id"], path, "report")
            for e in evaluations:
                numbers = {f"{e['result']['split']}/final/{k}": e["result"][k] for k in ("AP", "AP50", "AP75")}
                tracker.log_metrics(training["result"]["run_id"], {k: v for k, v in numbers.items() if v is not None})
        return made

    return _stage(store, "report", {}, inputs, work)


def last_verdict(settings: RunSettings, store: Path, data: Record, checkpoint: Path) -> Record | None:
    """What the gate last said in this store of a checkpoint, and what became of it since.

    Its "champion" is the present one, and "rolled_back" why the version was rolled back, or None. None where the
    checkpoint is no version, or the gate was not asked.
    """
    from pipelines.registry import champion, registered_name

    name = registered_name(settings, data["result"]["name"])
    same = f"name = '{name}' and tags.`model.safetensors_sha256` = '{weights_digest(checkpoint)}'"
    tracker = _tracker(settings, store, data)
    for version in tracker.client().search_model_versions(same):
        folder = Path(store) / "promote" / f"{name}-{version.version}"
        file = folder / "verdict.json"
        if is_remote(name_of(folder)):
            fetch(folder)
        if file.is_file():
            now = champion(tracker, name)
            verdict = {**read_json(file), "champion": now and now["version"],
                       "rolled_back": version.tags.get("rolled_back")}  # fmt: skip
            return {"stage": "promote", "version": 1, "key": digest(verdict), "result": verdict}
    return None


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A library's log says nothing while the block runs, which tells what it raises by itself."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _trials(stages: list[Record]) -> dict[str, Any] | None:
    """What the sweep among the stages left in trials.json; None without one, or where an older version wrote it."""
    for record in stages:
        if record["stage"] == "sweep" and (file := Path(record["folder"]) / "trials.json").is_file():
            found = read_json(file)
            return found if found["format"] == 2 else None
    return None


def pipeline(settings: RunSettings, store: Path, found: Source) -> dict[str, Any]:
    """All stages on what `source` found, as a durable workflow: the same call after a kill goes on with it.

    Returns {"exit_code", "verdict", "report", "predictions", "stages", ...}; a refused gate ends with exit
    code 3 and predictions by the standing champion. Raises UserError as the stages do.
    """
    from dbos import DBOS, DBOSPortableJSONSerializer
    from sqlalchemy.exc import SQLAlchemyError

    store = Path(store).resolve()
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_done(store, "made", error) from error
    # Other settings, data or stages are another workflow, whose steps are not taken from the ledger of this one.
    key = digest([settings.model_dump(mode="json"), APPLICATION_VERSION, VERSIONS, found.inputs])
    failed: list[BaseException] = []

    def step(name: str, function: Callable[..., Record], *arguments: Any) -> Record:
        """Run a stage as a step whose record is kept; what a user can mend comes back as data, not as a traceback."""

        def work() -> Record:
            try:
                return function(settings, store, *arguments)
            except UserError as error:
                return {"stage": name, "error": str(error), "exit_code": error.exit_code}

        record = DBOS.run_step({"name": name}, work)
        if "error" in record:
            raise _StageFailed(record["error"], record["exit_code"])
        return record

    @DBOS.workflow(name="pipeline")
    def run(workflow_key: str) -> dict[str, Any]:
        try:
            return _run_stages(settings, store, found, step)
        except _StageFailed as error:
            return {"error": str(error), "exit_code": error.exit_code}
        except Exception as error:
            failed.append(error)
            raise

    DBOS(
        config={
            "name": "detr",
            "system_database_url": settings.workflow.database or f"sqlite:///{store / 'workflow.db'}",
            "application_version": APPLICATION_VERSION,
            "executor_id": key,  # a start takes up what was stopped of its own settings, and nothing else
            "serializer": DBOSPortableJSONSerializer(),
            "log_level": "ERROR",
            "enable_otlp": False,
        }
    )
    try:
        with _quiet("dbos"):  # it logs the whole stack
            DBOS.launch()
    except SQLAlchemyError as error:  # of a database its own words, without the statement
        DBOS.destroy()
        words = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        at = f" at {bare(settings.workflow.database)}" if settings.workflow.database else f" in {store}"
        raise UserError(f"The pipeline's ledger{at} cannot be used: {words}. `detr doctor` looks at it.") from error
    # What a killed process left behind: taken up at the launch, through the ledger's own queue.
    waiting = DBOS.list_workflows(name="pipeline", status=["PENDING", "ENQUEUED"], executor_id=key)
    if waiting:
        console.print("Going on with the pipeline that was stopped.")
        handle = DBOS.retrieve_workflow(waiting[0].workflow_id)
    else:
        handle = DBOS.start_workflow(run, key)
    try:
        outcome = handle.get_result()
    except Exception:
        DBOS.destroy()
        if failed:
            raise failed[0] from None
        raise
    DBOS.destroy()  # not after Ctrl-C, which does not wait for the stages' threads
    if "error" in outcome:
        raise UserError(outcome["error"], outcome["exit_code"])
    return outcome


class _StageFailed(Exception):
    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def _run_stages(
    settings: RunSettings, store: Path, found: Source, step: Callable[..., Record]
) -> dict[str, Any]:
    from pipelines.fit import fit_to_data
    from pipelines.registry import registered_name

    data = step("ingest", ingest_stage, found)
    name = registered_name(settings, data["result"]["name"])
    trials = step("sweep", sweep_stage, data) if settings.sweep.in_pipeline else None
    best = trials["result"]["best"] if trials else {}
    tuned = settings
    if best:
        console.print(f"Training with the sweep's best settings: {best}")
        settings_tried, _ = fit_to_data(settings, data["folder"])  # as the sweep did
        tuned = override_settings(settings_tried, best)
    training = step("train", lambda _, store, data: train_stage(tuned, store, data), data)
    checkpoint = Path(training["folder"]) / "checkpoint"
    splits = [s for s in ("val", "test") if s in data["result"]["images"]]
    evaluations = [step(f"evaluate {s}", evaluate_stage, data, checkpoint, s) for s in splits]
    version = step("register", register_stage, data, checkpoint, training["result"]["run_id"], evaluations[0])
    verdict = step("promote", promote_stage, data, version["result"]["version"], evaluations[0])
    predictions = None
    champion = verdict["result"]["champion"]
    if champion is not None:
        try:
            place, _, _ = download_model(settings, store, f"models:/{name}/{champion}")
        except UserError as error:  # of a champion that stays one: the page says why nothing could beat it
            console.print(f"Nothing is predicted. {error}")
        else:
            images, chosen = _images_to_predict(settings, store, data, splits[-1])
            predictions = step("predict", lambda _, *rest: predict_stage(chosen, *rest), images, place, name, champion)
    stages = [stage for stage in (data, trials, training, *evaluations, version, verdict, predictions) if stage]
    if settings.data.path is None:
        stages.insert(0, sample_stage(settings, store))
    page = step("report", report_stage, data, stages, training, evaluations, verdict, predictions)
    promoted = verdict["result"]["promoted"]
    return {
        "exit_code": 0 if promoted else GATE_REFUSED,
        "dataset": data["result"],
        "settings_changed_by_sweep": best,
        "AP": {e["result"]["split"]: e["result"]["AP"] for e in evaluations},
        "AP50": {e["result"]["split"]: e["result"]["AP50"] for e in evaluations},
        "model": name,
        "version": version["result"]["version"],
        "champion": champion,
        "verdict": verdict["result"],
        "checkpoint": str(checkpoint),
        "predictions": predictions and predictions["folder"],
        "report": page["result"]["report"],
        "stages": [{"stage": s["stage"], "seconds": s["seconds"], "reused": s.get("reused", False)} for s in stages],
    }


def _images_to_predict(settings: RunSettings, store: Path, data: Record, split: str) -> tuple[str, RunSettings]:
    """The images of a split as `list_images` takes them, and the settings to do so."""
    from pyarrow.fs import FileType

    from pipelines.shards import read_split
    from pipelines.storage import join, kind

    images = join(data_path(settings, store), getattr(settings.data, split))
    if kind(images) != FileType.NotFound:
        return images, settings
    # Split off train, or no COCO file: a list of the names.
    folder = Path(data["folder"])
    names = read_split(folder, split, ["file_name"])["file_name"].to_pylist()
    listed = join(name_of(folder), f"{split}.images.json")
    write_json(listed, {"images": [{"file_name": name} for name in names]})
    source = read_json(folder / "dataset.json")["source"]
    return listed, override_settings(settings, {"data.images": source["images"]})


def download_model(settings: RunSettings, store: Path, uri: str) -> tuple[Path, str, str]:
    """A registered model's checkpoint folder on this machine, its name and version."""
    from pipelines.registry import download
    from pipelines.tracking import tracker

    return download(tracker(settings, store, ""), uri, Path(store) / "models")


def find_name(settings: RunSettings, store: Path, name: str | None):
    """The tracker, and the registered model's name: the one given, or that of the store's last dataset."""
    from pipelines.registry import registered_name

    data = latest(store, "ingest")
    if name is None:
        if data is None and settings.tracking.model_name is None:
            raise UserError("This store holds no dataset, so there is no model; give --model.", 2)
        name = registered_name(settings, data["result"]["name"] if data else "")
    return _tracker(settings, store, data or {"result": {"name": name}}), name


def find_model(settings: RunSettings, store: Path, uri: str | None) -> tuple[Path, str, str]:
    """Checkpoint folder, name and version of a model: the one given, or the champion for the store's last dataset."""
    if uri is None:
        from pipelines.registry import CHAMPION, check_champion, registered_name

        data = latest(store, "ingest")
        if data is None:
            raise UserError("This store holds no dataset, so there is no champion; give --model.", 2)
        name = registered_name(settings, data["result"]["name"])
        check_champion(_tracker(settings, store, data), name)
        uri = f"models:/{name}@{CHAMPION}"
    return download_model(settings, store, uri)


def run_of(settings: RunSettings, store: Path, data: Record, checkpoint: Path) -> str:
    """The MLflow run of a checkpoint that came from elsewhere: a run of its own."""
    tracker = _tracker(settings, store, data)
    tags = {"detr.stage": "import", "detr.weights": weights_digest(checkpoint)}
    found = tracker.find_run(tags)
    if found is None:
        found = tracker.start_run(f"{data['result']['name']}-import", None, tags)
        tracker.end_run(found)
    return found


def latest(store: Path, stage: str) -> Record | None:
    """The record of the stage that was done or asked for last in this store."""
    told = _latest(store).get(stage)
    if told is None:
        return None
    folder = Path(store).resolve() / told
    if is_remote(name_of(folder)) and stage != "predict":  # whose table stays where it is
        fetch(folder)
    try:
        record = read_json(join(name_of(folder), "stage.json"))
    except FileNotFoundError:
        return None
    return {**record, "folder": str(folder), "reused": True}


def _latest(store: Path) -> dict[str, Any]:
    """The folder of each stage that was done or asked for last, relative to the store."""
    try:
        return read_json(join(name_of(store), "latest.json"))
    except FileNotFoundError:
        return {"format": 2}


def _checkpoint_inputs(checkpoint: Path) -> dict[str, str]:
    """What a checkpoint finds depends on its weights, and on how they are read: sizes of images, order of labels."""
    weights, path = weights_digest(checkpoint), Path(checkpoint) / "config.json"
    config = read_json(path) if path.is_file() else {}
    return {"weights": weights, "config": digest({key: config.get(key) for key in ("model", "categories")})}


def weights_digest(checkpoint: Path) -> str:
    """sha256 of a checkpoint's weights; raises UserError when the folder holds none."""
    path = Path(checkpoint) / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{checkpoint} is no checkpoint folder: it has no model.safetensors.", 2)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _training_settings(settings: RunSettings) -> dict[str, Any]:
    """The settings a training depends on: with other values of the rest it goes on from where it is."""
    groups = settings.model_dump(mode="json")
    groups["train"] = {key: value for key, value in groups["train"].items() if key not in SAME_MODEL}
    chosen = {key: groups[key] for key in ("seed", "model", "loss", "fit", "train")}
    return {**chosen, "max_dets": settings.evaluate.max_dets, "max_pixels": settings.ingest.max_pixels}


def _training_inputs(settings: RunSettings, data: Record) -> dict[str, Any]:
    """Digests of the dataset, and of the weights to start from: another file at the same path is another training."""
    return {"dataset": data["result"]["digest"], **_weights_inputs(settings)}


def _weights_inputs(settings: RunSettings) -> dict[str, Any]:
    import pyarrow.fs

    from pipelines.storage import filesystem

    inputs = {}
    for key in ("init_from", "backbone_weights"):
        given = getattr(settings.train, key)
        if given and given != "imagenet":
            fs, path = filesystem(given)
            if fs.get_file_info(path).type == pyarrow.fs.FileType.Directory:
                path += "/model.safetensors"
            try:
                with fs.open_input_stream(path) as file:
                    inputs[key] = hashlib.file_digest(file, "sha256").hexdigest()
            except FileNotFoundError as error:
                raise UserError(f"{given} is no checkpoint folder: it has no model.safetensors.", 2) from error
    return inputs


def _tracker(settings: RunSettings, store: Path, data: Record):
    from pipelines.tracking import tracker

    return tracker(settings, Path(store), data["result"]["name"])


def _stage(
    store: Path, stage: str, settings: dict[str, Any], inputs: dict[str, Any], work: Callable[[Path], dict[str, Any]]
) -> Record:
    record = run_stage(store, stage, VERSIONS[stage], settings, inputs, work)
    _remember(store, record)
    _say(record)
    return record


def _remember(store: Path, record: Record) -> None:
    """That this is what the stage did last in the store."""
    store = Path(store).resolve()
    folder = Path(record["folder"]).relative_to(store).as_posix()
    with FileLock(str(store / ".latest.lock")):  # schedules run side by side
        pointers = _latest(store)
        if pointers.get(record["stage"]) != folder:
            write_json(join(name_of(store), "latest.json"), {**pointers, "format": 2, record["stage"]: folder})


def _timed(stage: str, work: Callable[[], dict[str, Any]]) -> Record:
    started = time.monotonic()
    result = work()
    seconds = round(time.monotonic() - started, 2)
    record = {"stage": stage, "version": 1, "key": digest(result), "result": result, "seconds": seconds}
    record["reused"] = False
    _say(record)
    return record


_SAID: set[str] = set()


def _look(settings: RunSettings, data: Record) -> None:
    """What in the data will hurt, before hours go into it; once in a process."""
    from pipelines.look import findings_table, look_at_data

    name = f"look {data['key']}"
    if name in _SAID:
        return
    _SAID.add(name)
    if findings := look_at_data(Path(data["folder"]), settings):
        console.print(findings_table(findings))


def _say(record: Record) -> None:
    """One line per stage, once in a process: stages are looked up by those that stand on them."""
    name = f"{record['stage']} {record.get('key')}"
    if name in _SAID:
        return
    _SAID.add(name)
    how = "already done" if record["reused"] else f"done in {record['seconds']:.1f} s"
    console.print(Text.assemble((record["stage"], "bold"), f" {how}"))

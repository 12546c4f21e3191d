"""What every command shares: its options, its exit codes, Ray, and how a result is printed.

Exit codes: 0 done, 1 failed, 2 wrong use, 3 a gate refused. Nothing heavy is imported before a command runs.
"""
from __future__ import annotations

import functools
import importlib
import io
import json
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import click

DONE, FAILED, WRONG_USE, GATE_REFUSED, INTERRUPTED = 0, 1, 2, 3, 130
STOPPED = "Stopped. The same command goes on from here."
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: Ray is one machine's own
KEEP_BLOCKS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 26)}


def job(example: str, takes_input: bool = False, opens_store: bool = True) -> Callable:
    """Make a command of `work(settings, store, **own options) -> result`, with the shared options and exit codes.

    takes_input: an argument that is no KEY=VALUE, or names a file, goes to work as `inputs`; one with a slash before
    its first "=" is a path or URI, as s3://bucket/day=1. work returns a JSON-like dict; its "exit_code", if any, is
    the command's; its "text" or, of tables and trees, its "page", if any, is what is printed for people. --json has no
    page: what is drawn there is in it as data. opens_store: store is a folder, of a store on S3 its mirror; else it is
    what was given.
    """

    def decorate(work: Callable[..., dict[str, Any]]) -> click.Command:
        name = work.__module__.rsplit(".", 1)[-1] if work.__module__ != "__main__" else Path(sys.argv[0]).stem

        @functools.wraps(work)
        def command(config, store, as_json, print_settings, overrides, **own):
            from pipelines.settings import load_settings

            if takes_input:
                own["inputs"] = [word for word in overrides if is_input(word)]
                overrides = [word for word in overrides if not is_input(word)]
            with as_told(name), one_sentence(as_json):
                settings = load_settings(config, overrides)
                if print_settings:
                    from pipelines.settings_page import as_yaml

                    click.echo(json.dumps(settings.model_dump(mode="json")) if as_json else as_yaml(settings))
                    return
                with redirect_stdout(sys.stderr):  # stdout is the result's alone; Ray prints there, too
                    result = work(settings, open_store(store, settings) if opens_store else store, **own)
            finish(result, as_json)

        shared = [
            click.argument("overrides", nargs=-1, metavar=("[INPUT] " if takes_input else "") + "[KEY=VALUE]..."),
            click.option("--config", metavar="FILE", help="Settings as YAML."),
            click.option("--store", default="store", show_default=True, metavar="FOLDER",
                         help="Where everything that is made is kept: a folder, or s3://BUCKET/PREFIX."),
            click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON."),
            click.option("--print-settings", is_flag=True,
                         help="Print what the settings resolve to and what each means, and stop."),
        ]  # fmt: skip
        for option in reversed(shared):
            command = option(command)
        return click.command(
            name, help=work.__doc__, epilog=f"Example: {example}", context_settings={"max_content_width": 100}
        )(command)

    return decorate


def open_store(given: str, settings) -> Path:
    """The folder of a store, of one at s3:// its mirror on this machine; UserError where it cannot be worked in."""
    from pipelines.settings import UserError

    if not given.startswith("s3://"):
        if Path(given).exists() and not Path(given).is_dir():
            raise UserError(f"The store {given} is a file; give a folder.", 2)
        return Path(given)
    from pipelines.mirror import open_store

    if settings.tracking.uri is None:
        raise UserError(
            f"A store on S3 ({given}) is for several machines, and runs and models need a place that they all reach: "
            "set tracking.uri to an MLflow server.", 2,
        )  # fmt: skip
    return open_store(given)


def is_input(word: str) -> bool:
    """Whether an argument of a command that takes inputs is one, and no KEY=VALUE."""
    return "=" not in word or "/" in word.split("=")[0] or os.path.exists(word)


def check_command(
    words: Sequence[str], allowed: Sequence[str], verb: str, left_out: Sequence[str], why: str
) -> tuple[dict[str, Any], click.Context]:
    """The settings that a command to be run later or elsewhere resolves to, and how click understood its words.

    Raises UserError (exit code 2) for a command that is not among the allowed, that has options to be left out, or
    options or settings that it lacks. verb: what it would have been, such as "scheduled"; why: why to leave out.
    """
    from pipelines.settings import UserError

    name, *rest = words
    if name not in allowed:
        raise UserError(f"{name!r} cannot be {verb}; these can: {', '.join(allowed)}.", 2)
    for word in rest:
        if word.partition("=")[0] in left_out:
            raise UserError(f"Leave out {word}: {why}.", 2)
    command = importlib.import_module(f"jobs.{name}").main
    printed, said = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(said):
            context = command.make_context(f"detr {name}", ["--print-settings", "--json", *rest])
            command.invoke(context)
    except click.ClickException as error:
        raise UserError(f"detr {name}: {error.format_message()}", 2) from error
    except SystemExit as error:
        raise UserError(said.getvalue().strip(), 2) from error
    return json.loads(printed.getvalue()), context


@contextmanager
def as_told(command: str) -> Iterator[None]:
    """What the command says is text or, with DETR_LOG=json, records that name it and the cluster's job it runs in."""
    from pipelines.progress import JOB, LOG, about, as_records, say_all_as_records

    if as_records():
        say_all_as_records()
    elif told := os.environ.get(LOG):
        click.echo(f"{LOG} is {told!r}; it can be json, or nothing.", err=True)
        sys.exit(WRONG_USE)
    with about(command=command, job=os.environ.get(JOB)):
        yield


@contextmanager
def one_sentence(as_json: bool) -> Iterator[None]:
    """What a user can mend, what MLflow could not do, and Ctrl-C end the command with one sentence and an exit code."""
    from pipelines.settings import UserError

    try:
        yield
    except UserError as error:
        fail(str(error), error.exit_code, as_json)
    except KeyboardInterrupt:
        from pipelines.tracking import end_open_runs

        end_open_runs("KILLED")
        fail(STOPPED, INTERRUPTED, as_json)
    except Exception as error:
        mlflow = sys.modules.get("mlflow.exceptions")  # who raised it has imported it
        if mlflow is None or not isinstance(error, mlflow.MlflowException):
            raise
        lines = str(error.message).strip().splitlines()  # below the first are a stack and the statement
        fail(f"MLflow failed: {lines[0] if lines else error.error_code}", FAILED, as_json)


def finish(result: dict[str, Any], as_json: bool) -> NoReturn:
    """Print a command's result and leave with its exit code."""
    from pipelines.progress import JOB

    code = result.pop("exit_code", DONE)
    data = dict(result)
    text = words_of(data)
    if as_json:
        said = result if JOB in os.environ else data  # a job's page is printed by who follows it
        click.echo(json.dumps({"exit_code": code, **said}, default=str))
    elif text:
        click.echo(text)
    sys.stdout.flush()
    sys.exit(code)


def words_of(result: dict[str, Any]) -> str | None:
    """What a command's result says to people; its page is taken out of it."""
    return result.pop("page", None) or result.get("text")


def fail(message: str, code: int, as_json: bool) -> NoReturn:
    """Say in one sentence why a command ends, and leave with its exit code."""
    if as_json:
        click.echo(json.dumps({"exit_code": code, "error": message}))
    from pipelines.progress import as_records, record

    if as_records():
        record(message, "error", exit_code=code)
    else:
        click.echo(message, err=True)
    sys.exit(code)


@contextmanager
def ray_session(settings, dashboard: bool = False) -> Iterator[None]:
    """Ray for the time of a command: started here, or the cluster of `cluster.address`.

    dashboard: with its State API, by which Ray frees the place of a sweep's trial that was stopped.
    """
    # Quiet: the stages say themselves what happens.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # More workers than cores are meant here, which Ray warns of every few seconds.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "maximum expected startup concurrency")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # So soon a checkpoint that was reported is known, and a training beside it validated; Ray asks every two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Workers keep the large blocks a training step frees and asks for again; glibc would give them back to the
    # system each time, and half of a CPU training's time goes into getting them anew.
    for name, value in KEEP_BLOCKS.items():
        os.environ.setdefault(name, value)
    import logging

    from pipelines.settings import UserError

    options: dict[str, Any] = {"address": settings.cluster.address}
    environment: dict[str, str] = {}
    if settings.cluster.address == "local":
        # Ray's processes ask the State API whether a training's controller lives, and free the places of its workers
        # if not. Untold, they ask whichever Ray the machine's current-cluster file names, or none where several run.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
        if "ray" not in sys.modules:  # which reads it once
            # All of it listens on loopback, as it does by itself on other systems than Linux: nobody else is to join,
            # and a laptop's address may change. Whoever wants Ray on all interfaces says 1.
            environment |= {LOOPBACK: os.environ.get(LOOPBACK, "0")}
        options |= {"num_cpus": settings.cluster.local_cpus(), "include_dashboard": dashboard, "dashboard_port": port}
        # Nobody takes this machine back, and every process of Ray's takes a hundredth of a core.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        with _environment(environment):  # which its processes inherit
            import ray

            ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(f"Ray's token is not here: {str(error).partition('. ')[0]}.", 2) from error
    except ConnectionError as error:
        raise UserError(
            f"There is no Ray cluster at {settings.cluster.address} ({error}); one that asks for a token wants "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH in the environment."
        ) from error
    except RuntimeError as error:
        if not str(error).startswith("Version mismatch"):
            raise
        raise UserError(f"This Python is not the cluster's: {' '.join(str(error).split())}") from error
    import ray.data
    import ray.train
    import ray.tune

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)  # Ray would just leave
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):  # their own imports set them up
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        if settings.cluster.gpus:
            wait_for_gpus(settings.cluster.gpus, settings.cluster.address == "local")
        yield
    finally:
        ray.shutdown()


def _stop(number: int, frame: Any) -> None:
    """A clean stop, as Ctrl-C is, also where a script started us in its background, where Ctrl-C is not heard."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def wait_for_gpus(count: int, local: bool) -> None:
    """Have the cluster start machines until it has so many GPUs; UserError on a machine, which cannot get more."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    from pipelines.progress import console
    from pipelines.settings import UserError

    there = int(ray.cluster_resources().get("GPU", 0))
    if there >= count:
        return
    if local:
        raise UserError(f"cluster.gpus is {count}, and this machine has {there}.", 2)
    console.print(f"The cluster has {there} of {count} GPUs (cluster.gpus): waiting for machines.")
    # Places that are asked for go with this process, however it ends. What is asked of the autoscaler itself stays,
    # and would keep machines that nobody uses.
    places = placement_group([{"GPU": 1}] * count)
    try:
        while not places.wait(5):  # for ever, as machines may be long in coming
            pass
    finally:
        remove_placement_group(places)


def table_text(table: Any) -> str:
    """A table of rich as text, as wide as the terminal."""
    from rich.console import Console

    page = Console(file=io.StringIO(), markup=False, width=shutil.get_terminal_size((160, 24)).columns)
    page.print(table)
    return page.file.getvalue().rstrip()


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def read_image(settings, path: Path):
    """The RGB image in a file; UserError if there is none or it cannot be used."""
    from detr.transforms import ImageError, decode_image
    from pipelines.settings import UserError

    if not path.is_file():
        raise UserError(f"There is no image {path}.", 2)
    try:
        return decode_image(path.read_bytes(), settings.predict.max_pixels)
    except ImageError as error:
        raise UserError(f"{path} cannot be used: {error}.", 2) from error


def last_training(store: Path) -> dict[str, Any]:
    """The record of the last training in this store; UserError where there is none."""
    from pipelines.settings import UserError
    from pipelines.workflow import latest

    training = latest(store, "train")
    if training is None:
        raise UserError("Nothing has been trained in this store yet; run `detr train`, or give --checkpoint.", 2)
    return training


def find_checkpoint(settings, store: Path, given: str | None) -> Callable[[dict[str, Any]], tuple[Path, str | None]]:
    """Look for the checkpoint that a command works on, before images are read: that given, or the last one trained.

    What is returned takes the record of the dataset and gives the checkpoint's folder and its MLflow run, if known.
    """
    from pipelines.settings import UserError
    from pipelines.workflow import download_model

    if given is not None:
        place = download_model(settings, store, given)[0]
        return lambda data: (place, None)
    training = last_training(store)

    def of_dataset(data: dict[str, Any]) -> tuple[Path, str | None]:
        if training["inputs"]["dataset"] != data["result"]["digest"]:
            raise UserError(
                f"The last training in this store was on another dataset than {data['result']['name']} as it is now; "
                "run `detr train` on this one, or give --checkpoint.", 2,
            )  # fmt: skip
        return Path(training["folder"]) / "checkpoint", training["result"]["run_id"]

    return of_dataset

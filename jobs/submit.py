"""Run a command on a Ray cluster, as one of its jobs."""
from __future__ import annotations

import shlex
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from jobs.common import DONE, INTERRUPTED, check_command, finish, is_input, one_sentence, words_of

SUBMITTABLE = (
    "pipeline", "sample", "ingest", "data", "suggest", "train", "sweep", "evaluate", "register", "promote", "rollback",
    "predict", "export", "report",
)  # fmt: skip
NOT_IN_COMMANDS = ("--json", "--print-settings", "--help", "--show")
# Settings that are a path or a URI; data.images and the like are relative to data.path.
PLACES = ("data.path", "train.storage", "train.init_from", "train.backbone_weights", "tracking.uri",
          "workflow.database")
NO_PLACE = ("imagenet",)
PLACE_WORDS = ("FOLDER", "FILE", "INPUT", "IMAGES")  # how options say that they take a path


def address_option(command):
    return click.option(
        "--address", metavar="URL",
        help="The cluster's dashboard; by default RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265.",
    )(command)  # fmt: skip


@click.command(
    "submit",
    epilog="Example: detr submit train --store /shared/store data.path=s3://bucket/my-data",
    context_settings={"max_content_width": 100, "allow_interspersed_args": False},
)
@address_option
@click.option("--detach", is_flag=True, help="Do not wait for its end.")
@click.option("--again", is_flag=True, help="Run it once more if it is done already.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND [OPTION|KEY=VALUE]...")
def main(address: str | None, detach: bool, again: bool, as_json: bool, words: tuple[str, ...]) -> None:
    """Run COMMAND on a Ray cluster, follow its log, and end with its result and exit code.

    COMMAND is a command of detr with its settings; what is wrong with them is said before anything is sent. This code
    and the file of --config go along, nothing else: paths are those of the cluster's machines. Submitted again while it
    runs, it is followed, and once it is done its result is shown; after a failure it is run anew. Ctrl-C leaves it
    running; `detr jobs` shows, follows and cancels it.
    """
    with one_sentence(as_json), redirect_stdout(sys.stderr):
        result = _submit(words, address, detach, again)
    finish(result, as_json)


def _submit(words: tuple[str, ...], address: str | None, detach: bool, again: bool) -> dict[str, Any]:
    from pipelines.settings import digest, flatten, refuse_password

    refuse_password(words, "the cluster's")
    settings, context = check_command(
        words, SUBMITTABLE, "submitted", NOT_IN_COMMANDS,
        "a job runs without a terminal, and --json stands before the command",
    )  # fmt: skip
    flat = flatten(settings)
    refuse_password([value for value in flat.values() if isinstance(value, str)], "the cluster's")
    _check_places(flat, context)

    from pipelines.submit import CONFIG, Client, api_address, pack, patiently, submit

    place = api_address(address)
    config = context.params["config"]
    sent = list(words)
    if config:
        sent = [word.replace(config, CONFIG) if word in (config, f"--config={config}") else word for word in words]
    if flat["cluster.address"] == "local":
        sent.append("cluster.address=auto")
    own = {k: v for k, v in context.params.items() if k not in ("config", "overrides", "as_json", "print_settings")}
    with tempfile.TemporaryDirectory() as folder:
        code = pack(Path(folder), Path(config) if config else None)
        asked = {
            "command": words[0], "settings": settings, "options": own, "code": code,
            "inputs": [word for word in context.params["overrides"] if is_input(word)],
        }  # fmt: skip
        first = f"detr-{words[0]}-{digest(asked)}"
        client = patiently(lambda: Client(place))
        job_id, how = patiently(lambda: submit(client, first, sent, Path(folder), words, again))
    if detach or how == "done before":
        return _left(client, job_id, how)
    starts = "runs" if how == "submitted" else "runs already"
    click.echo(f"{job_id} {starts} at {place}; its log follows.", err=True)
    return {"how": how, **follow_job(client, job_id)}


def _left(client, job_id: str, how: str) -> dict[str, Any]:
    """What is said of a job that is not followed."""
    from pipelines.submit import describe, known, result_of

    job = describe(known(client, job_id))
    if how == "done before":
        result = result_of(client, job_id)
        text = f"{job_id} is done since {job['ended']}; --again runs it once more."
        words = words_of(result) if result else None
        return {"how": how, **job, "result": result, "page": f"{text}\n{words}" if words else text}
    starts = "was submitted" if how == "submitted" else "runs already"
    text = f"{job_id} {starts}; follow it: {_command('follow', client, job_id)}"
    return {"how": how, **job, "exit_code": DONE, "text": text}


def follow_job(client, job_id: str) -> dict[str, Any]:
    """Follow a job to its end, its log on stderr: what came of it, with its exit code."""
    from pipelines.settings import UserError
    from pipelines.submit import Away, describe, ending, follow

    how_to = f"follow it again: {_command('follow', client, job_id)}; end it: {_command('cancel', client, job_id)}"
    try:
        job, result = follow(client, job_id, lambda line: click.echo(line, err=True))
    except KeyboardInterrupt as error:
        raise UserError(f"{job_id} goes on without you; {how_to}", INTERRUPTED) from error
    except Away as error:
        raise UserError(f"{error} What runs there goes on; {how_to}") from error
    _, words = ending(job)
    click.echo(words, err=True)
    words = words_of(result) if result else None
    return {**describe(job), "result": result, "page": words}


def _command(name: str, client, job_id: str) -> str:
    return shlex.join(["detr", "jobs", name, "--address", client.place, job_id])


def _check_places(settings: dict[str, Any], context: click.Context) -> None:
    """Raise UserError (exit code 2) for a path that means something in this folder alone."""
    from pipelines.settings import UserError

    here = "is a path from the folder you are in, which the cluster does not see"
    instead = "put it on S3 or a file system that all its machines share, and give that place's URI or absolute path"
    store = context.params["store"]
    if _is_relative(store):
        raise UserError(
            f"The store {store} {here}: give --store the absolute path of a folder that all its machines share.", 2
        )
    told = {key: settings.get(key) for key in PLACES if settings.get(key) not in NO_PLACE}
    for option in context.command.params:
        if isinstance(option, click.Option) and any(word in (option.metavar or "") for word in PLACE_WORDS):
            told[option.opts[-1]] = context.params[option.name]
    del told["--config"]
    inputs = [word for word in context.params["overrides"] if is_input(word)]
    for name, place in [*told.items(), *(("the input", word) for word in inputs)]:
        if place is not None and _is_relative(place):
            raise UserError(f"{place} ({name}) {here}; {instead}.", 2)


def _is_relative(place: str) -> bool:
    if place.startswith("sqlite:///"):
        return not place.startswith("sqlite:////")
    return not (place.startswith(("/", "~", "models:", "runs:")) or "://" in place)


if __name__ == "__main__":
    main()

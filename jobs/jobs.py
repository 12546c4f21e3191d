"""Show, follow and cancel the commands that run on a Ray cluster."""
from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import click

from jobs.common import finish, one_sentence, table_text, words_of
from jobs.submit import address_option, follow_job

WIDE = {"max_content_width": 100}


@click.group(epilog="Example: detr jobs list", context_settings=WIDE)
def main() -> None:
    """Show, follow and cancel the commands that `detr submit` has running on a Ray cluster."""


def _command(name: str, example: str) -> Callable:
    """Make a subcommand of `work(client, **own options) -> result`, as `job` makes commands."""

    def decorate(work: Callable[..., dict[str, Any]]) -> click.Command:
        @functools.wraps(work)
        def command(address, as_json, **own):
            with one_sentence(as_json), redirect_stdout(sys.stderr):
                from pipelines.submit import Client, api_address

                result = work(Client(api_address(address)), **own)
            finish(result, as_json)

        command = click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")(command)
        command = address_option(command)
        return main.command(name, help=work.__doc__, epilog=f"Example: {example}", context_settings=WIDE)(command)

    return decorate


@_command("list", "detr jobs list --address http://127.0.0.1:8265")
def show_list(client) -> dict:
    """Show the jobs of the cluster that `detr submit` made.

    With each, its state, its command, and when it started and ended.
    """
    from rich.table import Column, Table

    from pipelines.submit import describe, ours

    jobs = [describe(job) for job in ours(client)]
    table = Table(Column("job", overflow="fold"), "state", "started (UTC)", "ended (UTC)",
                  Column("command", overflow="fold"))  # fmt: skip
    for job in jobs:
        table.add_row(job["submission_id"], _state(job), _utc(job["started"]), _utc(job["ended"]), job["command"])
    return {"jobs": jobs, "page": table_text(table) if jobs else f"There are no jobs at {client.place}."}


@_command("status", "detr jobs status detr-train-0123456789abcdef")
@click.argument("job_id", metavar="JOB")
def status(client, job_id: str) -> dict:
    """Say how a job is.

    With the result that its command printed, once it is over.
    """
    from pipelines.submit import describe, ending, known, result_of

    found = known(client, job_id)
    job = describe(found)
    over = found.status.is_terminal()
    result = result_of(client, job_id) if over else None
    lines = [f"{job_id}: {_state(job)}", f"detr {job['command']}", f"Started {_utc(job['started'])} UTC"]
    if over:
        lines[-1] += f", ended {_utc(job['ended'])} UTC"
        lines.append(ending(found)[1])
    if result and (said := words_of(result) or result.get("error")):
        lines.append(said)
    # The exit code of this command is another thing.
    return {**job, "exit_code": 0, "command_exit_code": job["exit_code"], "result": result, "page": "\n".join(lines)}


@_command("follow", "detr jobs follow detr-train-0123456789abcdef")
@click.argument("job_id", metavar="JOB")
def follow(client, job_id: str) -> dict:
    """Follow a job's log from its first line to its end.

    The exit code is the command's. Ctrl-C leaves it running.
    """
    from pipelines.submit import known

    known(client, job_id)
    return follow_job(client, job_id)


@_command("cancel", "detr jobs cancel detr-train-0123456789abcdef")
@click.argument("job_id", metavar="JOB")
def cancel(client, job_id: str) -> dict:
    """Stop a job, as Ctrl-C stops a command here.

    Submitted again, the command goes on from there.
    """
    from pipelines.submit import cancel, describe, ending, known

    was_over = known(client, job_id).status.is_terminal()
    job = cancel(client, job_id)
    text = f"It was over already: {ending(job)[1]}" if was_over else ending(job)[1]
    return {**describe(job), "exit_code": 0, "command_exit_code": ending(job)[0], "text": text}


def _state(job: dict[str, Any]) -> str:
    code = job["exit_code"]
    return job["state"].lower() + (f" ({code})" if code else "")


def _utc(time: str | None) -> str:
    return time[:19].replace("T", " ") if time else ""


if __name__ == "__main__":
    main()

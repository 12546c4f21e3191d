"""`detr`: the commands, each a module of its own that is imported when it is called."""
from __future__ import annotations

import difflib
import importlib

import click

COMMANDS = {
    "pipeline": "Run all stages: images and labels in, promoted model, detections and report out.",
    "sample": "Write the built-in COCO dataset.",
    "ingest": "Check a COCO folder and write it as Parquet shards.",
    "data": "Show a dataset, and say what in it will hurt a training.",
    "suggest": "Say which batch size and learning rate suit this machine.",
    "train": "Train a DETR on the shards.",
    "sweep": "Try matching costs and loss weights, judged by AP.",
    "evaluate": "Measure a checkpoint: the COCO numbers, AP per class.",
    "register": "Put a checkpoint into the MLflow registry.",
    "promote": "Make a version champion if it passes the gate.",
    "rollback": "Give the title back to the champion before this one.",
    "history": "Every verdict on a model, and every move of its champion.",
    "lineage": "Say what a result was made from, and what was made from it.",
    "predict": "Detect on one image, a folder, a bucket prefix or a list.",
    "explain": "Draw where the model looks in one image, and each query over many.",
    "export": "Write a model as torch.export and ONNX files, checked against the model.",
    "report": "Write the page about the last training.",
    "schedule": "Run pipelines, sweeps and other commands on cron times.",
    "submit": "Run a command on a Ray cluster, as one of its jobs.",
    "jobs": "Show, follow and cancel the commands that run on a Ray cluster.",
    "doctor": "Look at what a run would use before it starts, and say what would hurt.",
}


class LazyGroup(click.Group):
    """Shows its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"jobs.{name}").main

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            if not near:
                raise
            raise click.UsageError(f"There is no command {args[0]!r}; did you mean {near[0]!r}?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(
    cls=LazyGroup,
    epilog="Example: detr pipeline data.path=path/to/coco",
    context_settings={"max_content_width": 100},
)
def main() -> None:
    """Object detection with DETR, from labelled images to a promoted model to detections over a bucket.

    Every command takes settings as KEY=VALUE (such as train.budget='20 minutes') or from --config FILE. Exit codes:
    0 done, 1 failed, 2 wrong use, 3 a gate refused.
    """


if __name__ == "__main__":
    main()

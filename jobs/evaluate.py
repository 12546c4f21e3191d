"""Measure a checkpoint: the COCO numbers, AP per class, how sure they are, where it errs; or against another one."""
from __future__ import annotations

from pathlib import Path

import click

from jobs.common import find_checkpoint, job, ray_session


@click.option("--checkpoint", metavar="FOLDER|models:/…", help="By default the last one trained in this store.")
@click.option("--split", default="val", show_default=True, help="train, val or test.")
@click.option("--against", metavar="FOLDER|models:/…", help="Measure this one, too, and say which is better.")
@job("detr evaluate --split test --against models:/NAME@champion")
def main(settings, store: Path, checkpoint: str | None, split: str, against: str | None) -> dict:
    """Measure a checkpoint on a split: the 12 COCO numbers, AP per class with intervals, the kinds of errors."""
    from pipelines.compare import compare_evaluations
    from pipelines.stage import read_json
    from pipelines.workflow import download_model, evaluate_stage, find_data

    comparison = None
    of_dataset = find_checkpoint(settings, store, checkpoint)
    other = download_model(settings, store, against)[0] if against else None
    read = find_data(settings, store)
    with ray_session(settings):
        data = read()
        place, _ = of_dataset(data)
        # The other first: the store's last evaluation is to be one's own.
        standing = evaluate_stage(settings, store, data, other, split) if other is not None else None
        record = evaluate_stage(settings, store, data, place, split)
        if standing is not None:
            folders = Path(standing["folder"]), Path(record["folder"])
            comparison = compare_evaluations(settings, Path(data["folder"]), split, *folders)
    result = record["result"]
    errors = read_json(Path(record["folder"]) / "metrics.json")["errors"]
    text = table(result, errors) + (f"\n\nAgainst {against}:\n{answer(comparison)}" if comparison else "")
    return {**result, "errors": errors, "comparison": comparison, "reused": record["reused"], "text": text}


def table(result: dict, errors: dict) -> str:
    """The figures as text; what has no ground truth says so."""

    from pipelines.resample import TOO_FEW

    def show(value: float | None) -> str:
        return "no ground truth" if value is None else f"{value:.3f}"

    def sure(value: float | None, interval: list[float] | None) -> str:
        if value is None or not result["resamples"]:
            return show(value)
        return f"{value:.3f} ({f'{interval[0]:.3f} to {interval[1]:.3f}' if interval else TOO_FEW})"

    def threshold(best: dict | None) -> str:
        if best is None:
            return "no ground truth"
        if best["threshold"] is None:
            return "nothing found"
        return f"best F1 {best['f1']:.3f} at score {best['threshold']:.3f}"

    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    lines = [f"{result['images']} images of {result['split']}"]
    lines += [f"{name:<6} {sure(result[name], result['intervals'][name])}" for name in names[:2]]
    lines += [f"{name:<6} {show(result[name])}" for name in names[2:]]
    lines += [f"all    {threshold(result['best_f1'])}", ""]
    width = max((len(c["name"]) for c in result["per_class"]), default=0)
    lines += [
        f"{c['name']:<{width}}  AP {sure(c['AP'], c['interval'])}  AP50 {show(c['AP50'])}  {threshold(c['best_f1'])}"
        if c["truth"] else f"{c['name']:<{width}}  no ground truth"
        for c in result["per_class"]
    ]  # fmt: skip
    if errors["threshold"] is not None:
        lines += ["", f"Errors at score {errors['threshold']:.3f}, and the AP50 that mending all of a kind would give:"]
        lines += [
            f"{kind:<24} {count:>7,}" + ("" if errors["cost"][kind] is None else f"  {errors['cost'][kind]:+.3f}")
            for kind, count in errors["counts"].items()
        ]
    return "\n".join(lines)


def answer(comparison: dict) -> str:
    """A comparison with another checkpoint, in words."""
    from pipelines.compare import in_words

    rows = [*((name, comparison[name]) for name in ("AP", "AP50")),
            *((f"{c['name']}: AP", c) for c in comparison["per_class"])]  # fmt: skip
    return "\n".join(in_words(name, figures, comparison["resamples"]) for name, figures in rows)


if __name__ == "__main__":
    main()

"""Write a model as torch.export and ONNX files, checked against the model."""
from __future__ import annotations

from pathlib import Path

import click

from jobs.common import job

FILES = {"torch": ["model.pt2"], "onnx": ["model.onnx"], "both": ["model.pt2", "model.onnx"]}


@click.option("--model", metavar="models:/NAME@champion|FOLDER", help="By default the champion for this dataset.")
@click.option("--output", default="export", show_default=True, metavar="FOLDER", help="Where the files go.")
@click.option("--format", "form", type=click.Choice(list(FILES)), default="both", show_default=True)
@job("detr export --model models:/sample@champion --output export")
def main(settings, store: Path, model: str | None, output: str, form: str) -> dict:
    """Write a model as torch.export (model.pt2) and ONNX (model.onnx), checked against the model.

    Beside them lie config.json, the checkpoint's own with its label map and preprocessing, and export.json with the
    greatest differences found. Batch size, height and width of the input are free. Files of an earlier export in the
    folder are removed. Masks are not exported: of a model that has them, the file gives logits and boxes.
    """
    import json
    import logging
    from importlib.metadata import version as installed

    from detr import export
    from detr.checkpoint import CheckpointError, load_checkpoint
    from detr.segmentation import DETRsegm
    from pipelines.settings import UserError
    from pipelines.stage import write_json
    from pipelines.storage import not_done
    from pipelines.workflow import find_model, weights_digest

    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --output names a folder.", 2)
    checkpoint, name, version = find_model(settings, store, model)
    try:
        detector, config = load_checkpoint(checkpoint)
    except CheckpointError as error:
        raise UserError(f"{error}.", 2) from error
    has_masks = isinstance(detector, DETRsegm)
    if has_masks:
        detector = detector.detr
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells of every operation it leaves as it is
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_done(folder, "made", error) from error
    for file in ("export.json", *FILES["both"]):
        (folder / file).unlink(missing_ok=True)  # of an earlier export, perhaps of another model
    program = export.export(detector)
    found = {}
    for file in FILES[form]:
        export.save(program, folder / file)
        found[file] = export.differences(detector, export.load(folder / file))
    if folder.resolve() != checkpoint.resolve():
        (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    low, high = export.side_limits(detector)
    result = {
        "model": name,
        "version": version,
        "outputs": export.OUTPUTS,
        "weights_sha256": weights_digest(checkpoint),
        "differences": found,
        "tolerances": export.TOLERANCES,
        "checked_shapes": export.CHECKED,
        "least_side": low,
        "greatest_side": high,
        "versions": {package: installed(package) for package in ("torch", "onnx", "onnxruntime", "onnxscript")},
    }
    write_json(folder / "export.json", {"format": 1, **result})
    for file, outputs in found.items():
        for key, value in outputs.items():
            if not value <= export.TOLERANCES[key]:  # NaN, too
                raise UserError(
                    f"{folder / file} is not to be used: its {key} differ from the model's by {value:.2g}, and at most "
                    f"{export.TOLERANCES[key]:.0e} is allowed."
                )
    lines = [
        f"{folder / file}: differs from the model by at most {outputs['pred_logits']:.1e} in logits and "
        f"{outputs['pred_boxes']:.1e} in boxes"
        for file, outputs in found.items()
    ]
    if has_masks:
        lines.append("The model's masks are not exported, only its logits and boxes.")
    return {**result, "folder": str(folder), "text": "\n".join(lines)}


if __name__ == "__main__":
    main()

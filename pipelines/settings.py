"""Everything a run can be told, in one place: one YAML file plus `key=value` overrides.

Every default is written here or, for the model, in `detr.config`. Commands print what a run resolved
to with `--print-settings`.
"""
from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from detr.config import FOCAL_WEIGHTS, PRESETS, LossConfig, ModelConfig, Settings

DEFAULT_MODEL = "tiny"
MOST_PIXELS = 178_956_970  # of an image: what Pillow decodes


class UserError(Exception):
    """Something the user can mend; the message is one sentence that says what and how.

    exit_code: 1 when the work failed, 2 when the command was used wrongly.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


_UNITS = {
    "step": "steps", "steps": "steps", "epoch": "epochs", "epochs": "epochs", "image": "images", "images": "images",
    "s": "seconds", "second": "seconds", "seconds": "seconds",
    "min": "minutes", "minute": "minutes", "minutes": "minutes", "h": "hours", "hour": "hours", "hours": "hours",
}  # fmt: skip


def parse_budget(text: str) -> tuple[float, Literal["steps", "epochs", "images", "seconds"]]:
    """'300 epochs', '5000 steps', '20000 images', '12 minutes' -> (amount, unit); times come back in seconds.

    Raises ValueError for anything else.
    """
    amount, unit = _amount_and_unit(text)
    if not unit or amount <= 0:
        raise ValueError(
            f"{text!r} is not a length such as '300 epochs', '5000 steps', '20000 images' or '12 minutes'"
        )
    return amount, unit  # type: ignore[return-value]


def parse_length(text: str) -> tuple[float, Literal["steps", "epochs", "images"]]:
    """'1 epoch', '100 steps', '2000 images' -> (amount, unit); the amount may be 0.

    Raises ValueError for anything else, times among it.
    """
    amount, unit = _amount_and_unit(text)
    if not unit or unit == "seconds":
        raise ValueError(f"{text!r} is not a length such as '100 steps', '1 epoch' or '2000 images' ('0 steps': none)")
    return amount, unit  # type: ignore[return-value]


def _amount_and_unit(text: Any) -> tuple[float, str | None]:
    """The unit is None where it is no length."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", str(text).lower())
    if not match:
        return 0.0, None
    amount, unit = float(match.group(1)), _UNITS.get(match.group(2))
    if unit in ("minutes", "hours"):
        return amount * {"minutes": 60, "hours": 3600}[unit], "seconds"
    return amount, unit


def _budget(value: Any) -> Any:
    parse_budget(value)
    return value


def _length(value: Any) -> Any:
    parse_length(value)
    return value


def _share_or_length(value: Any) -> Any:
    if isinstance(value, (int, float)) and 0 < value <= 1:
        return float(value)
    amount, unit = _amount_and_unit(value)
    if not unit or unit == "seconds" or amount <= 0:
        raise ValueError(f"{value!r} is neither a share of the training such as 0.8 nor a length such as '200 epochs'")
    return value


# Checked before their type is: a number without a unit is told what to write, too.
Budget = Annotated[str, BeforeValidator(_budget)]
Length = Annotated[str, BeforeValidator(_length)]
ShareOrLength = Annotated[float | str, BeforeValidator(_share_or_length)]


class DataSettings(Settings):
    """Where the labelled images are. Without a path the built-in images are made."""

    path: str | None = Field(None, description="a COCO folder; none means the built-in images")
    name: str | None = Field(None, description="the dataset's name; by default the folder's")
    images: str = Field("images", description="folder of the images, relative to path")
    train: str = Field("instances_train.json", description="annotations, relative to path")
    val: str = Field("instances_val.json", description="annotations, relative to path; if absent, split off train")
    test: str = Field("instances_test.json", description="annotations, relative to path; used when present")
    val_fraction: float = Field(0.2, gt=0, lt=1, description="share split off train where there is no val file")


class SampleSettings(Settings):
    """The built-in dataset: handwritten digits pasted on two photographs."""

    train: int = Field(6000, gt=0)
    val: int = Field(400, gt=0)
    test: int = Field(200, ge=0)
    max_objects: int = Field(5, ge=0)
    seed: int = Field(0, ge=0)


class IngestSettings(Settings):
    rows_per_shard: int = Field(256, gt=0)
    segmentation: bool = Field(True, description="keep the annotations' segmentation (for `detr data --coco`)")
    over_edge: Literal["clamp", "reject"] = Field(
        "clamp", description="boxes that reach over the image's edge: cut there, or (by more than a pixel) rejected"
    )
    max_pixels: int = Field(
        100_000_000, gt=0, le=MOST_PIXELS, description="larger images are rejected before decoding"
    )
    max_reject_fraction: float = Field(0.1, ge=0, le=1, description="more rejected images, or boxes, stop the run")


class AugmentSettings(Settings):
    """What happens to a training image (the official recipe is `recipe: detr`)."""

    recipe: Literal["detr", "light", "none"] = Field(
        "light", description="detr: as published; light: flips, scale and crop, colour, mosaic; none: resize only"
    )
    horizontal_flip: bool = Field(True, description="mirror left and right; not for text or digits")
    vertical_flip: bool = Field(False, description="also flip upside down; for images without an up")
    scale: float = Field(0.3, ge=0, lt=1, description="light: sizes vary by up to this share")
    colour: float = Field(0.2, ge=0, lt=1, description="light: brightness and contrast vary by up to this share")
    mosaic: float = Field(
        0.5, ge=0, le=1, description="light: share of images put together from crops of four, after ten epochs"
    )


class TrainSettings(Settings):
    budget: Budget = Field("12 minutes", description="'300 epochs', '5000 steps', '20000 images' or '12 minutes'")
    batch_size: int = Field(8, gt=0, description="images per worker and step")
    num_workers: int = Field(1, gt=0, description="Ray Train workers, each of which takes batch_size images a step")
    recompute: bool = Field(
        False, description="compute activations again in the backward pass: much less memory, a third more time"
    )
    compile: bool = Field(
        False, description="torch.compile for backbone and encoder: a minute or more at the start, then faster steps"
    )
    freeze: list[str] = Field(
        [], description="parts that stay as they are, by the names of their weights: [backbone, transformer.encoder]"
    )
    min_workers: int | None = Field(
        None, gt=0, description="go on with so few when others are lost, until they are back; by default wait for all"
    )
    max_failures: int = Field(3, ge=-1, description="how often to go on after a worker was lost; -1: always")
    micro_batches: int = Field(
        1, gt=0, description="compute a worker's batch in so many parts, one after another: less memory, the same step"
    )
    use_gpu: bool | None = Field(None, description="by default, whether the cluster has GPUs")
    precision: Literal["float32", "bfloat16"] = "float32"
    optimizer: Literal["adamw", "muon"] = Field(
        "muon", description="adamw: as published; muon: for the matrices inside the network, adamw for the rest"
    )
    lr: float = Field(2e-3, gt=0)
    lr_backbone: float | None = Field(
        None, ge=0, description="0 freezes it; by default lr, and a tenth of it where trained weights are given"
    )
    lr_scaling: Literal["none", "sqrt", "linear"] = Field(
        "none", description="lr and lr_backbone with the number of workers: as they are, times its root, or times it"
    )
    weight_decay: float = Field(1e-4, ge=0)
    clip_max_norm: float = Field(1.0, ge=0)
    warmup: Length = Field("100 steps", description="'100 steps', '1 epoch' or '2000 images'; '0 steps': none")
    lr_schedule: Literal["step", "cosine"] = "cosine"
    lr_flat: float = Field(
        0.5, ge=0, lt=1, description="cosine schedule: share of the training before the rate falls (Huang et al. 2025, "
        "DEIM: flat cosine)",
    )
    lr_drop: ShareOrLength = Field(
        0.8, description="step schedule: share of it before the cut to a tenth, or a length such as '200 epochs'"
    )
    ema_decay: float = Field(0.998, ge=0, lt=1, description="moving average of the weights; 0 switches it off")
    first_image_size: int | None = Field(
        None, gt=0, description="model.image_size in the first part of the training, where it is the smaller one; "
        "by default the preset's, where fit.image_size enlarges the images",
    )
    first_share: float = Field(
        0.6, ge=0, lt=1, description="share of the time with first_image_size; 0: no such part"
    )
    validations: int = Field(6, gt=0, description="how often AP is measured during the training")
    validation: Literal["auto", "inline", "beside"] = Field(
        "auto", description="AP is measured by the workers in between (inline) or by a task while they go on (beside); "
        "auto: beside where the cluster has a GPU more than workers",
    )
    checkpoint_minutes: float = Field(
        10.0, gt=0, description="a checkpoint to go on from at least so often, also between validations"
    )
    storage: str | None = Field(
        None, description="a folder or s3:// prefix for checkpoints while a training runs, which all machines reach; "
        "by default in the store",
    )
    patience: int = Field(
        0, ge=0, description="stop after so many validations without a better AP; 0: never. (A cosine schedule gains "
        "most at its end: give it a budget instead.)",
    )
    augment: AugmentSettings = AugmentSettings()
    init_from: str | None = Field(
        None, description="a checkpoint folder or official .pth to start from, local or on S3; all that fits is taken"
    )
    backbone_weights: Annotated[str | None, BeforeValidator(lambda given: None if given == "none" else given)] = Field(
        None, description="'imagenet' (torchvision's), a .pth or .safetensors file, local or on S3, or none"
    )

    @model_validator(mode="after")
    def _go_together(self) -> TrainSettings:
        if self.min_workers and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers is more than num_workers, which is {self.num_workers}")
        if self.recompute and self.compile:
            raise ValueError("recompute and compile do not go together; set one of them to false")
        return self

    def backbone_rate(self, trained: bool) -> float:
        """lr_backbone, or by default lr, of a trained backbone a tenth: the published ratio (Carion et al. 2020)."""
        if self.lr_backbone is not None:
            return self.lr_backbone
        return self.lr / 10 if trained else self.lr

    def rate_factor(self) -> float:
        """What lr and lr_backbone are multiplied with for the number of workers (lr_scaling)."""
        return {"none": 1.0, "sqrt": math.sqrt(self.num_workers), "linear": float(self.num_workers)}[self.lr_scaling]


# How a training is done, and not what comes of it.
SAME_MODEL = (
    "micro_batches", "recompute", "compile", "min_workers", "max_failures", "validation", "checkpoint_minutes",
    "storage",
)  # fmt: skip


class FitSettings(Settings):
    """What is set from the data when a training starts (pipelines/fit.py).

    By default what the settings of a model with anchor queries do not say themselves.
    """

    image_size: bool = Field(False, description="model.image_size and image_max_size, from the sizes of the boxes")
    num_queries: bool = Field(False, description="model.num_queries, from the number of objects in an image")


SIDES = ("model.image_size", "model.image_max_size")
# Which switch would set a setting anew.
FITTED = {**dict.fromkeys(SIDES, "fit.image_size"), "model.num_queries": "fit.num_queries"}


class Range(Settings):
    """Numbers from low to high, whole ones where both are."""

    low: int | float
    high: int | float
    log: bool = Field(False, description="evenly over the logarithm: for rates and weights")

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) is not less than high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low above 0, not {self.low}")
        return self

    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


# Told apart by their form, so that an error is about the one that was meant.
Axis = Annotated[
    Annotated[list[Any], Field(min_length=1), Tag("values")] | Annotated[Range, Tag("range")],
    Discriminator(lambda given: "range" if isinstance(given, dict | Range) else "values"),
]


class SweepSettings(Settings):
    in_pipeline: bool = Field(False, description="whether `detr pipeline` sweeps, and trains with the best settings")
    trials: int = Field(8, gt=0, description="at most so many, the present settings among them")
    budget: Budget = Field("90 seconds", description="length of one trial, as train.budget")
    validations: int = Field(
        4, gt=0, description="how often AP is measured during a trial, and a scheduler may stop it"
    )
    search: Literal["random", "grid", "optuna"] = Field(
        "random", description="optuna: later trials are near the good ones among those before (TPE); pays from some "
        "twenty trials on",
    )
    scheduler: Literal["asha", "median", "none"] = Field(
        "asha", description="stops a trial whose AP is in the lower half at the validation of the grace period, or "
        "at twice, four times … as many (asha); or below the median at any from there on (median)",
    )
    grace_period: int = Field(
        2, gt=0, description="validations of a trial before it may be stopped: what short trials show before is little"
    )
    space: dict[str, Axis] | None = Field(
        None, description="settings by name, each with a list of values or {low, high, log}; by default costs, loss "
        "weights, rates, queries and denoising around the present settings",
    )
    tied: bool = Field(
        True, description="a matching cost changes with the weight of its loss, unless the space names both"
    )
    max_concurrent: int | None = Field(
        None, gt=0, description="trials at once; by default as many as there is room for"
    )
    min_gain: float = Field(0.01, ge=0, description="AP a trial must gain over the present settings to be taken")


class EvaluateSettings(Settings):
    batch_size: int = Field(16, gt=0)
    max_dets: int = Field(100, gt=0, description="detections per image that count, as COCO's maxDets")
    resamples: int = Field(
        1000, ge=0, description="how often the images are drawn anew to say how sure AP is (bootstrap); 0: not at all"
    )


class GateSettings(Settings):
    """What a model must show to become champion."""

    min_ap: float = Field(0.01, ge=0, le=1, description="absolute floor, also for a first champion")
    margin: float = Field(
        0.0, ge=0, description="AP above the present champion's on the same images; the low end of the difference's "
        "confidence interval must be above it",
    )
    max_class_drop: float = Field(
        0.1, ge=0, le=1, description="AP that a class may lose to the champion; more is refused where the loss is sure "
        "(its whole confidence interval)",
    )
    max_seen: float = Field(
        0.01, ge=0, le=1, description="share of the images it is measured on that it may have been trained on, or on "
        "nearly the same",
    )
    max_rejected: float = Field(
        0.1, ge=0, le=1, description="share of the images to measure on that ingest may have rejected"
    )
    max_megabytes: float | None = Field(None, gt=0, description="of the weights; by default any size")
    min_images_per_second: float | None = Field(
        None, gt=0, description="when it was evaluated; by default any speed"
    )


class PredictSettings(Settings):
    score_threshold: float | None = Field(None, ge=0, le=1, description="by default the model's own")
    batch_size: int = Field(16, gt=0, description="images of one shape that a model sees at once")
    images_per_shard: int = Field(256, gt=0, description="images whose detections are written, and counted, at once")
    actors: int | None = Field(
        None, gt=0, description="models that work side by side; by default one for each GPU, or machine without"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: twice as fast where the device has units for it; the last digits differ"
    )
    compile: bool = Field(
        False, description="torch.compile: a minute or more at the start, then faster batches; the last digits may "
        "differ from run to run",
    )
    tile: int | None = Field(
        None, ge=32, description="side in pixels of the image: larger images are also looked at in tiles of this size, "
        "for small objects in large images",
    )
    tile_overlap: float = Field(
        0.25, ge=0, le=0.8, description="share of a tile that it has in common with the next; objects up to this size "
        "are whole in one of them",
    )
    max_pixels: int = Field(100_000_000, gt=0, le=MOST_PIXELS, description="larger images are rejected before decoding")
    max_reject_fraction: float = Field(0.5, ge=0, le=1, description="more rejected images in the table stop the run")


def without_password(uri: str | None) -> str | None:
    """A URI as it is; ValueError for one with a password: settings are kept with every result and shown on its page."""
    if uri and re.search(r"://[^/@]*:[^/]*@|[?&]password=", uri):
        raise ValueError(
            "it holds a password, which would be kept with every result; leave it out, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, or PGPASSWORD for PostgreSQL"
        )
    return uri


class TrackingSettings(Settings):
    uri: str | None = Field(
        None, description="MLflow server, or its database; by default SQLite in the store. Without a password"
    )
    experiment: str | None = Field(None, description="by default the dataset's name")
    model_name: str | None = Field(None, description="registered model; by default the dataset's name")

    @field_validator("uri")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        return without_password(uri)


class WorkflowSettings(Settings):
    database: str | None = Field(
        None, description="where a pipeline notes what it has done, as postgresql://me@host/detr; by default SQLite in "
        "the store. Without a password (PGPASSWORD)",
    )

    @field_validator("database")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        if uri and not uri.startswith(("postgresql://", "postgresql+psycopg://", "sqlite:///")):
            raise ValueError("write it as postgresql://USER@HOST/NAME, or leave it out for SQLite in the store")
        return without_password(uri)


class ClusterSettings(Settings):
    address: str = Field("local", description="a Ray cluster's address; 'local' starts Ray here")
    num_cpus: int | None = Field(None, gt=0, description="logical CPUs of a local Ray; by default max(6, cores)")
    cost_per_hour: float | None = Field(
        None, gt=0, description="of all its machines, in any currency, to be told what stages and 1,000 images cost"
    )
    gpus: int | None = Field(
        None, gt=0, description="wait until the cluster has so many, which has machines started where it starts them"
    )

    def local_cpus(self) -> int:
        """Logical CPUs of a Ray that starts here: at least six, since a resumed Ray Data job starves with few."""
        from joblib import cpu_count  # of what a container or an affinity leaves

        return self.num_cpus or max(6, cpu_count())


class RunSettings(Settings):
    """All settings of a run."""

    seed: int = Field(0, ge=0)
    data: DataSettings = DataSettings()
    sample: SampleSettings = SampleSettings()
    ingest: IngestSettings = IngestSettings()
    model: ModelConfig = ModelConfig.model_validate(DEFAULT_MODEL)
    loss: LossConfig = LossConfig(**FOCAL_WEIGHTS)
    fit: FitSettings = FitSettings()
    train: TrainSettings = TrainSettings()
    sweep: SweepSettings = SweepSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    gate: GateSettings = GateSettings()
    predict: PredictSettings = PredictSettings()
    tracking: TrackingSettings = TrackingSettings()
    workflow: WorkflowSettings = WorkflowSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_model(cls, values: Any) -> Any:
        """A model told in part starts from the default preset; a focal loss has weights of its own; what of the model
        is not told is fitted to the data."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        model = values.get("model", DEFAULT_MODEL)
        if isinstance(model, dict) and "preset" not in model:
            model = {"preset": DEFAULT_MODEL, **model}
        values["model"] = model
        loss = values.get("loss") or {}
        name = model if isinstance(model, str) else model.get("preset")
        told = model if isinstance(model, dict) else {}
        known = {**PRESETS.get(name, {}), **told}
        if isinstance(loss, dict):
            values["loss"] = {**(FOCAL_WEIGHTS if known.get("class_loss") == "focal" else {}), **loss}
        fit = values.get("fit") or {}
        if isinstance(fit, dict):
            anchors = known.get("queries") == "anchors"
            values["fit"] = {
                "image_size": anchors and not {"image_size", "image_max_size"} & told.keys(),
                "num_queries": anchors and "num_queries" not in told,
                **fit,
            }
        return values

    @model_validator(mode="after")
    def _boxes_alone(self) -> RunSettings:
        if self.model.masks:
            raise ValueError("model.masks: a run trains on boxes alone; set it to false, or use detr.segmentation")
        return self


def load_settings(config: str | Path | None = None, overrides: Iterable[str] = ()) -> RunSettings:
    """Settings from a YAML file (or none) and overrides such as 'train.lr=2e-4'.

    Raises UserError (exit code 2) naming the file or override, the key, and the nearest right key.
    """
    values: dict[str, Any] = {}
    overrides = list(overrides)
    if config is not None:
        path = Path(config)
        if not path.is_file():
            raise UserError(f"There is no settings file {path}.", 2)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}", 2) from error
        if not isinstance(values, dict):
            raise UserError(f"{path} must hold settings as 'key: value' lines, not a {type(values).__name__}.", 2)
    told = {override.partition("=")[0] for override in overrides}
    model = values.get("model")
    printed = isinstance(model, dict) and model.keys() >= ModelConfig.model_fields.keys()  # leaves nothing to a preset
    if "model" in told or ("model.preset" in told and printed):
        values.pop("model", None)
        values.pop("fit", None)  # to the file's model, as in override_settings
        if isinstance(values.get("train"), dict):
            values["train"].pop("first_image_size", None)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r} is not a setting; write it as key=value, such as train.lr=2e-4.", 2)
        set_key(values, key, _parse_value(text))
        if key in FITTED and not any(other.startswith(f"{FITTED[key]}=") for other in overrides):
            set_key(values, FITTED[key], False)
    return validate_settings(values, str(config) if config else "the settings")


def validate_settings(values: dict[str, Any], where: str = "the settings") -> RunSettings:
    """A nested dict -> RunSettings; raises UserError (exit code 2) with one sentence."""
    try:
        return RunSettings.model_validate(values)
    except ValidationError as error:
        # A misspelt setting first: what is missing is most often what it was to be.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        loc = [str(part) for part in first["loc"]]
        key = ".".join(loc)
        if first["type"] == "extra_forbidden":
            known = _known_keys(RunSettings)
            near = difflib.get_close_matches(key, known, 1, 0.5) or difflib.get_close_matches(
                loc[-1], [k.rsplit(".", 1)[-1] for k in known], 1, 0.5
            )
            full = near[0] if near and near[0] in known else next(
                (k for k in known if near and k.rsplit(".", 1)[-1] == near[0]), None
            )
            hint = f"; did you mean {full!r}?" if full else "; `--print-settings` lists them all"
            raise UserError(f"There is no setting {key!r} in {where}{hint}", 2) from error
        raise UserError(f"Setting {key!r} in {where}: {first['msg'].removeprefix('Value error, ')}.", 2) from error


def refuse_password(words: Iterable[str], whose: str) -> None:
    """Raise UserError (exit code 2) for a word of a command that holds a password; whose: environment to keep it in."""
    for word in words:
        if re.search(r"://[^/@\s]*:[^@\s]+@", word):
            raise UserError(
                f"{re.sub(r'://.*@', '://...@', word)} holds a password, which would be kept and shown; give it in "
                f"{whose} environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD) instead.", 2,
            )  # fmt: skip


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """values['a']['b'] = value for key 'a.b', making the groups on the way."""
    *groups, last = key.split(".")
    for group in groups:
        inner = values.get(group)
        if isinstance(inner, str) and group == "model":
            inner = {"preset": inner}
        values[group] = values = dict(inner) if isinstance(inner, dict) else {}
    values[last] = value


def override_settings(settings: RunSettings, changes: dict[str, Any]) -> RunSettings:
    """A copy of the settings with dotted keys replaced; raises UserError for an unknown key.

    What is replaced is not fitted to the data any more.
    """
    values = settings.model_dump(mode="json")
    if "model.preset" in changes:
        changes = {"model": changes["model.preset"], **{k: v for k, v in changes.items() if k != "model.preset"}}
    if "model" in changes:  # these follow the new model
        values.pop("fit")
        values["train"].pop("first_image_size")
    fixed = {FITTED[key]: False for key in changes if key in FITTED}
    for one, other in (SIDES, SIDES[::-1]):
        if one in changes and other not in changes:  # in proportion
            now = {key: getattr(settings.model, key.removeprefix("model.")) for key in SIDES}
            fixed[other] = round(changes[one] * now[other] / now[one])
    changes = {**fixed, **changes}
    for key, value in changes.items():
        set_key(values, key, value)
    return validate_settings(values)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict -> one with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def digest(value: Any, length: int = 16) -> str:
    """Hex digest of a JSON-like value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _parse_value(text: str) -> Any:
    if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text):
        return float(text)  # YAML 1.1 reads 4e-4 as a string
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys += _known_keys(inner, prefix + name + ".")
    return keys

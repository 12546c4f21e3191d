"""Everything a run can be told, in one place: one YAML file plus `key=value` overrides.

Every default, and below it what the setting means, is written here or, for the model, in `detr.config`. Commands print
what a run resolved to with `--print-settings`; `pipelines.settings_page` makes the page of all settings.
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

    exit_code: 2 where the command ends so until the user changes what he gave (command line, settings, files, data,
    names, rights), 1 where a store, network, machine or the work itself failed.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code
        self.add_note(f"exit code {exit_code}")  # Ray hands on the text of a task's error alone


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
    """The labelled images. The names of files are for COCO; Pascal VOC and YOLO have their own."""

    path: str | None = None
    """Folder of the data, here or at s3://: COCO, Pascal VOC or YOLO. Without it `detr ingest` and
    `detr pipeline` take the built-in images, and other commands the dataset that the store worked on last, if any."""

    name: str | None = None
    """The dataset's name, by which runs and the registered model are called; by default the folder's."""

    images: str = "images"
    """Folder of the images: relative to path, or an absolute one or an s3:// prefix."""

    train: str = "instances_train.json"
    """COCO annotations to train on, relative to path."""

    val: str = "instances_val.json"
    """COCO annotations to validate on, relative to path; if there is no such file, images are split off train."""

    test: str = "instances_test.json"
    """COCO annotations to test on, relative to path; used if there is such a file."""

    val_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the training images that is split off for validation where there is none; images that are nearly the
    same stay together."""


class SampleSettings(Settings):
    """The built-in dataset: handwritten digits pasted on two photographs, made where data.path names no data."""

    train: int = Field(6000, gt=0)
    """Images to train on."""

    val: int = Field(400, gt=0)
    """Images to validate on."""

    test: int = Field(200, ge=0)
    """Images to test on; 0: no test split."""

    max_objects: int = Field(5, ge=0)
    """Most digits in an image, which has a random number of them."""

    seed: int = Field(0, ge=0)
    """Start of the random numbers that draw the images: the same seed makes the same images."""


class IngestSettings(Settings):
    """How annotations and images are checked and written as Parquet shards."""

    rows_per_shard: int = Field(256, gt=0)
    """Images in one Parquet file."""

    segmentation: bool = True
    """Whether the annotations' segmentation is kept, for `detr data --coco`."""

    over_edge: Literal["clamp", "reject"] = "clamp"
    """Boxes that reach over the image's edge: cut there, or, by more than a pixel, rejected."""

    max_pixels: int = Field(100_000_000, gt=0, le=MOST_PIXELS)
    """Most pixels of an image; larger ones are rejected before they are decoded. Training and evaluation decode no
    more, either."""

    max_reject_fraction: float = Field(0.1, ge=0, le=1)
    """Share of the images, or of the annotations, that may be rejected; more stop the run."""


class AugmentSettings(Settings):
    """What happens to a training image."""

    recipe: Literal["detr", "light", "none"] = "light"
    """detr: as published (flips, resize, crop); light: flips, crop, colour, mosaic; none: resize alone."""

    horizontal_flip: bool = True
    """Whether every second image is mirrored left and right, in the recipes detr and light; not for text or digits."""

    vertical_flip: bool = False
    """Whether every second image is flipped upside down, in the recipes detr and light; for images without an up."""

    scale: float = Field(0.3, ge=0, lt=1)
    """Recipe light: every second image is cropped, each side by up to this share."""

    colour: float = Field(0.2, ge=0, lt=1)
    """Recipe light: brightness and contrast vary by up to this share."""

    mosaic: float = Field(0.5, ge=0, le=1)
    """Recipe light: share of the images that are put together from crops of four, after ten epochs."""


class TrainSettings(Settings):
    """How a model is trained."""

    budget: Budget = "12 minutes"
    """Length of the training: '300 epochs', '5000 steps', '20000 images' or '12 minutes'. Epochs and images count what
    all workers see; minutes are those of training alone."""

    batch_size: int = Field(8, gt=0)
    """Images that each worker takes in a step."""

    num_workers: int = Field(1, gt=0)
    """Ray Train workers, one GPU or CPU core each; a step is made of batch_size images of each of them."""

    recompute: bool = False
    """Whether most activations are computed again in the backward pass: much less memory, a third more time."""

    compile: bool = False
    """Whether backbone and encoder are compiled (torch.compile): a minute or more at the start, then faster steps."""

    freeze: list[str] = Field([])
    """Parts of the model that stay as they are, by the names of their weights, such as [backbone,
    transformer.encoder]."""

    min_workers: int | None = Field(None, gt=0)
    """Workers with which the training goes on when others are lost, until they are back; by default it waits for
    all."""

    max_failures: int = Field(3, ge=-1)
    """How often the training goes on after a worker was lost; -1: always."""

    micro_batches: int = Field(1, gt=0)
    """Parts in which a worker's batch is computed, one after another: less memory, the same step."""

    use_gpu: bool | None = None
    """Whether models train, and detect, on GPUs; by default where Ray has some."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Numbers that the model computes with; bfloat16 takes less memory where the GPU has it. Matching and
    losses stay in float32."""

    optimizer: Literal["adamw", "muon"] = "muon"
    """adamw: as published; muon: Muon for the matrices inside the network, AdamW for the rest."""

    lr: float = Field(2e-3, gt=0)
    """Learning rate of all but the backbone, at its highest."""

    lr_backbone: float | None = Field(None, ge=0)
    """Learning rate of the backbone, at its highest; 0 freezes it. By default lr, and a tenth of it where trained
    weights are given."""

    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """What both learning rates are multiplied with for the number of workers: nothing, its root, or the number."""

    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of AdamW and Muon: in each step weights shrink by this share times the learning rate."""

    clip_max_norm: float = Field(1.0, ge=0)
    """Longest gradient of a step: one whose norm over all weights is greater is scaled down to it. 0: no limit."""

    warmup: Length = "100 steps"
    """Length in which the learning rate rises from nothing: '100 steps', '1 epoch' or '2000 images'; '0 steps':
    none."""

    lr_schedule: Literal["step", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up: to a tenth at lr_drop (step), or along a cosine from lr_flat on,
    to 2 % at the end (cosine)."""

    lr_flat: float = Field(0.5, ge=0, lt=1)
    """Cosine schedule: share of the training before the rate falls (Huang et al. 2025, DEIM: flat cosine)."""

    lr_drop: ShareOrLength = 0.8
    """Step schedule: share of the training before the rate falls to a tenth, or a length such as '200 epochs'."""

    ema_decay: float = Field(0.998, ge=0, lt=1)
    """Share of the averaged weights that stays in a step, the rest coming from the trained ones; the average is what is
    measured and kept. 0 switches it off."""

    first_image_size: int | None = Field(None, gt=0)
    """model.image_size in pixels in the first part of the training, where it is the smaller one; by default the
    preset's, where fit.image_size enlarges the images."""

    first_share: float = Field(0.6, ge=0, lt=1)
    """Share of the time with first_image_size; 0: no such part."""

    validations: int = Field(6, gt=0)
    """How often AP is measured during the training."""

    validation: Literal["auto", "inline", "beside"] = "auto"
    """Who measures AP: the workers in between (inline), or a task while they go on (beside); auto: beside where the
    cluster has a GPU more than workers."""

    checkpoint_minutes: float = Field(10.0, gt=0)
    """Most minutes between two checkpoints to go on from; every validation leaves one, too."""

    storage: str | None = None
    """Folder or s3:// prefix for checkpoints while a training runs, which all machines reach; by default in the
    store."""

    patience: int = Field(0, ge=0)
    """Validations without a better AP after which the training stops; 0: it never does. A cosine schedule gains most at
    its end: give it a shorter budget instead."""

    augment: AugmentSettings = AugmentSettings()

    init_from: str | None = None
    """Checkpoint folder or official .pth file to start from, here or at s3://; all that fits is taken."""

    backbone_weights: Annotated[str | None, BeforeValidator(lambda given: None if given == "none" else given)] = None
    """Weights of the backbone to start from: imagenet (torchvision's), a .pth or .safetensors file, here or at s3://,
    or none."""

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
    """What of the model is set from the data when a training starts."""

    image_size: bool = False
    """Whether model.image_size and image_max_size are set from the sizes of the boxes; by default with
    model.queries: anchors where neither is set."""

    num_queries: bool = False
    """Whether model.num_queries is set from the number of objects in an image; by default with model.queries:
    anchors where it is not set."""


SIDES = ("model.image_size", "model.image_max_size")
# Which switch would set a setting anew.
FITTED = {**dict.fromkeys(SIDES, "fit.image_size"), "model.num_queries": "fit.num_queries"}


class Range(Settings):
    """Numbers from low to high, whole ones where both are."""

    low: int | float
    """The lowest number."""

    high: int | float
    """The highest number."""

    log: bool = False
    """Whether numbers are drawn evenly over the logarithm: for rates and weights."""

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
    """How other settings are tried, in short trainings that are judged by AP."""

    in_pipeline: bool = False
    """Whether `detr pipeline` sweeps, and trains with the best settings."""

    trials: int = Field(8, gt=0)
    """Most trainings that are tried, the one with the present settings among them."""

    budget: Budget = "90 seconds"
    """Length of one trial, as train.budget."""

    validations: int = Field(4, gt=0)
    """How often AP is measured during a trial, after which a scheduler may stop it."""

    search: Literal["random", "grid", "optuna"] = "random"
    """How points of the space are chosen: at random, all of them (grid), or near those that were good (optuna: TPE,
    which pays from some twenty trials on)."""

    scheduler: Literal["asha", "median", "none"] = "asha"
    """Stops a trial whose AP is in the lower half at the validation of the grace period, or at twice, four times
    as many and so on (asha); or below the median at any from there on (median)."""

    grace_period: int = Field(2, gt=0)
    """Validations of a trial before it may be stopped: what short trials show before is little."""

    space: dict[str, Axis] | None = None
    """Settings by name, each with a list of values or with {low, high, log}, where log: true draws evenly over the
    logarithm. By default costs, loss weights, rates, queries and denoising around the present settings."""

    tied: bool = True
    """Whether a matching cost changes with the weight of its loss, unless the space names both."""

    max_concurrent: int | None = Field(None, gt=0)
    """Most trials at once; by default as many as there is room for."""

    min_gain: float = Field(0.01, ge=0)
    """AP (0 to 1) that a trial must gain over the present settings to be taken."""


class EvaluateSettings(Settings):
    """How a checkpoint is measured."""

    batch_size: int = Field(16, gt=0)
    """Images that a model sees at once where AP is measured, in a training, too."""

    max_dets: int = Field(100, gt=0)
    """Detections of an image that count, the surest first, as COCO's maxDets."""

    resamples: int = Field(1000, ge=0)
    """How often the images are drawn anew to say how sure AP is (bootstrap); 0: not at all."""


class GateSettings(Settings):
    """What a model must show to become champion."""

    min_ap: float = Field(0.01, ge=0, le=1)
    """Least AP (0 to 1) on the validation images, also of a first champion."""

    margin: float = Field(0.0, ge=0)
    """AP (0 to 1) above the present champion's on the same images; the low end of the difference's confidence interval
    must be above it."""

    max_class_drop: float = Field(0.1, ge=0, le=1)
    """AP (0 to 1) that a class may lose to the champion; more is refused where the loss is sure (its whole confidence
    interval)."""

    max_seen: float = Field(0.01, ge=0, le=1)
    """Share of the images a model is measured on that it may have been trained on, or on nearly the same."""

    max_rejected: float = Field(0.1, ge=0, le=1)
    """Share of the images to measure on that ingest may have rejected."""

    max_megabytes: float | None = Field(None, gt=0)
    """Most megabytes that the weights have; by default any size."""

    min_images_per_second: float | None = Field(None, gt=0)
    """Fewest images a second when it was evaluated; by default any speed."""


class PredictSettings(Settings):
    """How a model detects on images without labels."""

    score_threshold: float | None = Field(None, ge=0, le=1)
    """Least score of what is kept, of every class; by default the model's own thresholds. 0 keeps everything."""

    batch_size: int = Field(16, gt=0)
    """Images of one shape that a model sees at once."""

    images_per_shard: int = Field(256, gt=0)
    """Images whose detections are written, and counted, at once."""

    actors: int | None = Field(None, gt=0)
    """Models that work side by side; by default one for each GPU, or for each machine where none is used."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is twice as fast where the device has units for it; the last digits differ."""

    compile: bool = False
    """Whether the model is compiled (torch.compile): a minute or more at the start, then faster batches. The last
    digits may differ from run to run."""

    tile: int | None = Field(None, ge=32)
    """Side in pixels of the image: larger images are also looked at in tiles of this size, for small objects in large
    images. By default there are no tiles."""

    tile_overlap: float = Field(0.25, ge=0, le=0.8)
    """Share of a tile that it has in common with the next; objects up to this size are whole in one of them."""

    max_pixels: int = Field(100_000_000, gt=0, le=MOST_PIXELS)
    """Most pixels of an image; larger ones are rejected before they are decoded."""

    max_reject_fraction: float = Field(0.5, ge=0, le=1)
    """Share of the table's images that may be rejected; more stop the run."""


def without_password(uri: str | None) -> str | None:
    """A URI as it is; ValueError for one with a password: settings are kept with every result and shown on its page."""
    if uri and re.search(r"://[^/@]*:[^/]*@|[?&]password=", uri):
        raise ValueError(
            "it holds a password, which would be kept with every result; leave it out, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, or PGPASSWORD for PostgreSQL"
        )
    return uri


class TrackingSettings(Settings):
    """Where MLflow keeps runs and models."""

    uri: str | None = None
    """MLflow server, or its database, without a password; by default SQLite in the store."""

    experiment: str | None = None
    """MLflow's experiment for the runs; by default the dataset's name."""

    model_name: str | None = None
    """Name of the registered model; by default the dataset's."""

    @field_validator("uri")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        return without_password(uri)


class WorkflowSettings(Settings):
    """Where a pipeline keeps its ledger."""

    database: str | None = None
    """Where a pipeline notes what it has done, as postgresql://me@host/detr, without a password (PGPASSWORD); by
    default SQLite in the store."""

    @field_validator("database")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        if uri and not uri.startswith(("postgresql://", "postgresql+psycopg://", "sqlite:///")):
            raise ValueError("write it as postgresql://USER@HOST/NAME, or leave it out for SQLite in the store")
        return without_password(uri)


class ClusterSettings(Settings):
    """The Ray that commands work on."""

    address: str = "local"
    """Address of a Ray cluster; local starts Ray here."""

    num_cpus: int | None = Field(None, gt=0)
    """Logical CPUs of a Ray that starts here; by default its cores, and at least 6."""

    cost_per_hour: float | None = Field(None, gt=0)
    """What all machines of the cluster cost in an hour, in any currency, to be told what stages and 1,000 images
    cost."""

    gpus: int | None = Field(None, gt=0)
    """GPUs to wait for, which has the cluster start machines where it can; by default nothing is waited for."""

    def local_cpus(self) -> int:
        """Logical CPUs of a Ray that starts here: at least six, since a resumed Ray Data job starves with few."""
        from joblib import cpu_count  # of what a container or an affinity leaves

        return self.num_cpus or max(6, cpu_count())


class RunSettings(Settings):
    """All settings of a run."""

    seed: int = Field(0, ge=0)
    """Start of the random numbers of a run: first weights, order and changes of the images, the split of val off train,
    the draws of evaluations and sweeps. The built-in images have their own (sample.seed)."""

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

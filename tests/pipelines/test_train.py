"""What the training loop decides, without Ray: history, starting weights, bad numbers."""
from __future__ import annotations

import json
from types import SimpleNamespace
from urllib.error import URLError

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.train
import torch
from mlflow.exceptions import MlflowException
from torchvision.models import resnet18

from detr.checkpoint import save_checkpoint
from detr.config import ModelConfig
from detr.criterion import SetCriterion
from detr.model import DETR
from pipelines import train as module
from pipelines import training_log
from pipelines.ingest import ingest, source
from pipelines.sample import write_sample
from pipelines.settings import RunSettings, TrainSettings, UserError, override_settings
from pipelines.stage import write_json
from pipelines.tracking import tracker
from pipelines.train import (
    check_labels,
    explain_failure,
    find_weights,
    load_initial_weights,
    set_up,
    train_step,
    update_average,
)
from pipelines.training_log import PROGRESS, TrainingLog, read_history

SMALL = {
    "preset": "tiny", "num_classes": 3, "hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 2,
    "dim_feedforward": 32, "num_queries": 6,
}  # fmt: skip


def test_a_backbone_with_trained_weights_learns_at_a_tenth_of_the_rate(tmp_path):
    def rates(**options) -> list[float]:
        told = {"lr": 1e-3, "optimizer": "adamw", **options}
        changes = {f"train.{key}": value for key, value in told.items()}
        settings = override_settings(RunSettings(model=SMALL), changes)
        optimizer = set_up(settings, ["a", "b", "c"], torch.device("cpu"))[3]
        return [group["lr"] for group in optimizer.param_groups]

    categories = [{"id": i, "name": name} for i, name in enumerate("abc")]
    save_checkpoint(tmp_path / "same", DETR(ModelConfig(**SMALL)), categories)
    save_checkpoint(tmp_path / "other", DETR(ModelConfig(**{**SMALL, "backbone": "medium"})), categories)
    assert rates() == pytest.approx([1e-3, 1e-3])
    assert rates(init_from=str(tmp_path / "same")) == pytest.approx([1e-3, 1e-4])
    assert rates(init_from=str(tmp_path / "other")) == pytest.approx([1e-3, 1e-3])  # another backbone starts at random
    assert rates(init_from=str(tmp_path / "same"), lr_backbone=5e-4) == pytest.approx([1e-3, 5e-4])
    assert rates(lr_backbone=0) == pytest.approx([1e-3])


def test_steps_done_again_after_a_stop_count_once(tmp_path):
    path = tmp_path / "progress.jsonl"
    lines = [
        {"event": "start", "step": 0}, {"event": "step", "step": 20, "loss": 3.0},
        {"event": "validation", "step": 20, "AP": 0.1}, {"event": "step", "step": 40, "loss": 9.0},
        {"event": "start", "step": 20}, {"event": "step", "step": 40, "loss": 2.0},
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"event": "st')  # killed while writing
    history = read_history(path)
    feed = SimpleNamespace(steps_per_epoch=lambda: 3.5, images=7)
    TrainingLog(path, None, "", {}).start(40, [], (1, 1), 1, feed)  # as the next start does
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()[-2:]] == ["step", "start"]
    assert [(s["step"], s["loss"]) for s in history["steps"]] == [(20, 3.0), (40, 2.0)]
    assert [v["AP"] for v in history["validations"]] == [0.1]


def test_the_average_forgets_its_start_and_copies_counters():
    model = torch.nn.BatchNorm1d(2)
    ema = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    torch.nn.init.zeros_(model.weight)
    update_average(ema, model, 0.99)
    assert torch.equal(ema.module.weight, model.weight)  # the first is taken as it is
    torch.nn.init.ones_(model.weight)
    model.num_batches_tracked += 8
    update_average(ema, model, 0.99)
    torch.testing.assert_close(ema.module.weight, torch.full((2,), 1 - 2 / 11))
    assert ema.module.num_batches_tracked == 8
    for _ in range(200):
        update_average(ema, model, 0.99)
    assert ema.module.weight.min() > 0.99


def test_starting_weights_are_taken_where_they_fit(tmp_path):
    torch.manual_seed(0)
    source = DETR(ModelConfig.model_validate(SMALL))
    save_checkpoint(tmp_path / "old", source, [{"id": i, "name": str(i)} for i in range(3)])
    target = DETR(ModelConfig.model_validate({**SMALL, "num_classes": 5}))
    options = TrainSettings(init_from=(tmp_path / "old").as_uri(), backbone_weights="none")
    (message,) = load_initial_weights(target, options, ["new", "2", "1", "other", "0"])
    assert "3 of 5 classes by name; new classes new, other" in message
    own, theirs = target.state_dict(), source.state_dict()
    assert torch.equal(own["bbox_embed.layers.0.weight"], theirs["bbox_embed.layers.0.weight"])
    assert torch.equal(own["class_embed.weight"][[1, 2, 4]], theirs["class_embed.weight"][[2, 1, 0]])


def test_backbone_weights_are_loaded_before_those_of_the_whole_model(tmp_path):
    config = {**SMALL, "backbone": "resnet18", "norm": "frozen"}
    net = resnet18()
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    model = DETR(ModelConfig.model_validate(config))
    options = {"backbone_weights": str(tmp_path / "resnet18.pth")}
    (message,) = load_initial_weights(model, TrainSettings(**options), ["a", "b", "c"])
    assert message == f"backbone: 100 weights of {tmp_path / 'resnet18.pth'}"
    assert torch.equal(model.backbone[0].body.layer2[0].conv1.weight, net.layer2[0].conv1.weight)
    save_checkpoint(tmp_path / "old", DETR(model.config), [{"id": i, "name": str(i)} for i in range(3)])
    messages = load_initial_weights(
        model, TrainSettings(**options, init_from=str(tmp_path / "old")), ["a", "b", "c"]
    )
    assert len(messages) == 2
    assert not torch.equal(model.backbone[0].body.layer2[0].conv1.weight, net.layer2[0].conv1.weight)


def test_starting_weights_that_cannot_be_read_are_one_sentence(tmp_path):
    model = DETR(ModelConfig.model_validate(SMALL))
    for given in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(UserError, match=str(given)):
            load_initial_weights(model, TrainSettings(init_from=str(given)), ["a", "b", "c"])


def test_weights_that_the_network_does_not_give_are_a_failure_and_wrong_ones_wrong_use(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_, **__: (_ for _ in ()).throw(URLError("no network")))
    model = DETR(ModelConfig.model_validate({**SMALL, "backbone": "resnet18", "norm": "frozen"}))
    (tmp_path / "wrong.pth").write_text("no weights")
    for given, code in (("imagenet", 1), (str(tmp_path / "wrong.pth"), 2)):
        with pytest.raises(UserError) as error:
            load_initial_weights(model, TrainSettings(backbone_weights=given), ["a", "b", "c"])
        assert error.value.exit_code == code


def test_paths_of_weights_hold_wherever_a_worker_runs(tmp_path, monkeypatch):
    (tmp_path / "w.pth").touch()
    monkeypatch.chdir(tmp_path)
    given = override_settings(
        RunSettings(), {"train.init_from": "w.pth", "train.backbone_weights": "imagenet"}
    )
    assert find_weights(given).train.init_from == str(tmp_path / "w.pth")
    assert find_weights(given).train.backbone_weights == "imagenet"
    with pytest.raises(UserError, match=r"no file or folder absent\.pth"):
        find_weights(override_settings(given, {"train.backbone_weights": "absent.pth"}))


def test_outputs_that_are_not_finite_name_the_images():
    settings = override_settings(RunSettings(), {"model": SMALL})
    model = DETR(settings.model)
    with torch.no_grad():
        model.class_embed.bias.fill_(float("nan"))
    batch = {
        "images": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "sizes": torch.tensor([[64, 64]] * 2),
        "counts": torch.tensor([1, 0]), "labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]]),
        "image_ids": torch.tensor([11, 42]), "position": torch.tensor([0]),
    }  # fmt: skip
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k and "tracked" not in k}
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match=r"11, 42.*train\.lr"):
        train_step(model, SetCriterion(settings.model, settings.loss), optimizer, [batch], 0, settings)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items() if k != "class_embed.bias")


def test_what_the_user_can_mend_is_a_sentence(tmp_path, monkeypatch):
    def said(error: Exception, storage: str | None = None) -> str:
        return str(explain_failure(error, tmp_path, storage))

    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")):  # fmt: skip
        assert "Raise train.micro_batches, set train.recompute=true, or lower" in said(error)
    writing = RuntimeError("PytorchStreamWriter failed writing file")
    assert explain_failure(writing, tmp_path, None) is None  # there is space
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    for error in (OSError(28, "No space left on device"), writing,
                  Exception("(sqlite3.OperationalError) database or disk is full")):  # fmt: skip
        assert str(tmp_path) in said(error) and "run the same command" in said(error)
    for storage in (None, "s3://a/b"):  # the next try may go well
        assert explain_failure(OSError("what else"), tmp_path, storage) is None
    assert explain_failure(ValueError("a mistake of ours"), tmp_path, "s3://a/b") is None


def test_patience_waits_for_validations_beside_the_training(monkeypatch):
    """Those of images at full size alone, up to the one before."""
    def stale(validated: int, aps: dict[int, float], full_from: int = 0, patience: int = 3) -> int:
        found = [SimpleNamespace(metrics={"AP": ap, "step": 10 * n, "validated": n}) for n, ap in aps.items()]
        monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda: found)
        state = {"validated": validated, "stale": 0}
        module._learn_of_validations(0, state, TrainSettings(patience=patience), full_from)
        return state["stale"]

    assert stale(1, {}) == 0 and stale(2, {1: 0.3}) == 0
    assert stale(5, {2: 0.5, 3: 0.4, 4: 0.4}) == 2  # of others no checkpoint was kept
    assert stale(5, {2: 0.5, 4: -1.0}) == 2
    assert stale(5, {2: 0.5, 3: 0.2, 4: 0.3}, full_from=25) == 0
    assert stale(9, {2: 0.5}, patience=0) == 0


def test_labels_outside_the_map_are_found(tmp_path):
    table = pa.table({"file_name": ["a.jpg", "b.jpg"], "labels": pa.array([[0, 1], [2]], pa.list_(pa.int64()))})
    pq.write_table(table, tmp_path / "train-0.parquet")
    record = {"splits": {"train": {"shards": [{"path": "train-0.parquet", "rows": 2}]}}, "categories": [{}] * 3}
    write_json(tmp_path / "dataset.json", record)
    check_labels(tmp_path, record)
    with pytest.raises(UserError, match=r"b\.jpg .* has the label 2, and the label map ends at 1"):
        check_labels(tmp_path, {**record, "categories": [{}] * 2})


def test_parts_are_frozen_by_their_names_and_settings_that_exclude_each_other_are_refused():
    settings = override_settings(RunSettings(model=SMALL), {"train.freeze": ["backbone"], "train.recompute": True})
    model, *_, messages = set_up(settings, ["a", "b", "c"], torch.device("cpu"))
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert messages[-1].startswith("frozen: backbone, 0.") and model.backbone[0].recompute
    with pytest.raises(UserError, match="no part of the model is named 'backbon'; the nearest is 'backbone'"):
        set_up(override_settings(settings, {"train.freeze": ["backbon"]}), ["a", "b", "c"], torch.device("cpu"))
    with pytest.raises(UserError, match="recompute and compile do not go together"):
        override_settings(settings, {"train.compile": True})
    with pytest.raises(UserError, match="min_workers is more than num_workers"):
        override_settings(settings, {"train.min_workers": 2})


@pytest.mark.parametrize("preset", ["detr_resnet50", "tiny"])
def test_a_training_step_copies_to_the_host_once_and_logging_once_in_many(
    tmp_path, preset, host_copies, monkeypatch
):
    monkeypatch.setattr(training_log, "LOG_EVERY", 5)
    small = {**SMALL, "preset": preset, "backbone": "small", "norm": "batch"}
    settings = override_settings(RunSettings(), {"model": small})
    model = DETR(settings.model)
    ema = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-4, 1e-4), fused=True)
    criterion = SetCriterion(settings.model, settings.loss)
    log = TrainingLog(tmp_path / "progress.jsonl", None, "", {})
    log.per_epoch, log._track = 10.0, lambda metrics, step: None
    batch = {
        "images": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "sizes": torch.tensor([[64, 64], [48, 64]]),
        "counts": torch.tensor([1, 2]), "labels": torch.tensor([0, 1, 2]), "boxes": torch.full((3, 4), 0.4),
        "image_ids": torch.tensor([11, 42]), "position": torch.tensor([0]),
    }  # fmt: skip
    batch["counts"].on_host = batch["position"].on_host = ema.n_averaged.on_host = True
    steps = 2 * training_log.LOG_EVERY
    with host_copies() as copies:
        for step in range(steps):
            losses, norm = train_step(model, criterion, optimizer, [batch], step, settings)
            update_average(ema, model, 0.99)
            log.step(step + 1, steps, None, losses, norm, 1e-4, 2)
    assert set(copies.seen) == {"cpu"}
    # The matcher's, of the proposals, too; and two of the log.
    assert len(copies.seen) == steps * (1 + settings.model.two_stage) + 2
    assert len((tmp_path / "progress.jsonl").read_text().splitlines()) == 2


@pytest.mark.ray
def test_time_spent_measuring_ap_is_no_training_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training_log.time, "monotonic", lambda: now[0])
    log = TrainingLog(tmp_path / "progress.jsonl", None, "", {}, active=False)
    one = torch.tensor(1.0)
    for step in range(1, 61):
        now[0] += 0.5
        log.step(step, 100, None, {"loss": one}, one, 1e-3, 8)
        if step in (20, 37):  # where the log has just been written, and in between
            with log.paused():
                now[0] += 1000
    assert log.rates == [16.0] * 3


@pytest.mark.parametrize("error", [MlflowException("Connection refused"), UserError("Connection refused: password")])
def test_an_mlflow_that_is_away_gets_the_figures_later_and_the_training_goes_on(tmp_path, monkeypatch, error):
    told, clock = [], [100.0]
    monkeypatch.setattr(training_log.time, "monotonic", lambda: clock[0])

    class Away:
        away = True

        def log_metrics(self, run_id, metrics, step, **bound):
            told.append("asked") if self.away else told.append((step, metrics["val/AP"], bound))
            if self.away:
                raise error

    server, of_val = Away(), {"model_id": "m-1"}
    log = TrainingLog(tmp_path / PROGRESS, server, "run", of_val)
    found = {"AP": 0.5, "AP50": 0.7, "per_class": []}
    for step in (10, 20, 30):
        log.validation(step, {**found, "AP": step / 100})
    assert told == ["asked"]  # and not before a minute is over
    clock[0] += 61
    log.validation(40, found)
    assert told == ["asked"] * 2
    server.away = False
    clock[0] += 61
    log.send()
    assert told[2:] == [(step, ap, of_val) for step, ap in ((10, 0.1), (20, 0.2), (30, 0.3), (40, 0.5))]
    records = [json.loads(line) for line in (tmp_path / PROGRESS).read_text().splitlines()]
    messages = [record["text"] for record in records if record["event"] == "message"]
    assert len(messages) == 1 and "Connection refused" in messages[0]


def test_patience_ends_a_training_that_gets_no_better(tmp_path, ray_cluster):
    """Weights that do not move: no validation is better than the first."""
    settings = override_settings(RunSettings(), {
        **{f"model.{key}": value for key, value in SMALL.items() if key != "preset"}, "model.denoising.groups": 0,
        "sample.train": 8, "sample.val": 4, "sample.test": 0, "train.budget": "40 steps", "train.validations": 20,
        "train.batch_size": 2, "train.lr": 1e-12, "train.lr_backbone": 1e-12, "train.patience": 2,
    })  # fmt: skip
    write_sample(settings.sample, tmp_path / "images")
    (tmp_path / "dataset").mkdir()
    ingest(settings, source(settings, tmp_path / "images"), tmp_path / "dataset")
    (tmp_path / "run").mkdir()
    place = tracker(settings, tmp_path, "patience")
    found = module.train(settings, tmp_path / "dataset", tmp_path / "run", place, "patience")
    aps = [v["AP"] for v in read_history(tmp_path / "run" / PROGRESS)["validations"]]
    assert found["stopped_early"] and found["steps"] == 2 * len(aps) < 40
    assert max(aps[-2:]) <= max(aps[:-2])
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()

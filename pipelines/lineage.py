"""Where a result comes from and what came of it: dataset -> run -> weights -> version -> table of detections.

Nothing is kept for it: the stages' records in the store, MLflow's runs and the tags of registered versions name
each other by digests and ids, which are put together here, and followed both ways.
"""
from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from rich.text import Text
from rich.tree import Tree

from pipelines.mirror import records
from pipelines.registry import CHAMPION, history, registered_name
from pipelines.settings import RunSettings, UserError, flatten
from pipelines.stage import read_json
from pipelines.tracking import Tracker, tracker
from pipelines.workflow import latest, weights_digest

Key = tuple[str, str]  # kind and id
KINDS = {"dataset": "datasets", "run": "runs", "weights": "weights", "version": "versions", "table": "tables"}
SHAPES_A_MODEL = ("seed", "model", "loss", "fit", "train")  # groups of settings
UNKNOWN = "unknown"  # in a champion's times: when somebody moved the alias past the ledger
ELSEWHERE = "What other stores made is known here only where it was registered: not their other runs, and no tables."


def lineage(settings: RunSettings, store: Path, what: str | None = None) -> dict[str, Any]:
    """What `what` was made from, back to the data, and all that was made from it.

    what: the digest of a dataset or of weights or a run's id, or the first characters of one; models:/NAME/3 or
    models:/NAME@champion; a folder of the store or a checkpoint. By default the champion of the store's last dataset.
    Returns {"asked": {"kind", "id"}, "datasets": [...], "runs": [...], "weights": [...], "versions": [...], "tables":
    [...], "links": [[[kind, id], [kind, id]], ...] (the second was made from the first), "unknown": [sentence, ...]};
    each has "id" and what is known of it. Raises UserError if there is no such thing, or it could be several.
    """
    store = Path(store).resolve()
    what = what or _champion_of(settings, store)
    graph = _Graph(store, _tracker(settings, store))
    asked = graph.find(what)
    shown = graph.reached(asked, graph.parents) | graph.reached(asked, graph.children)
    found = {plural: [] for plural in KINDS.values()}
    for kind, name in graph.nodes:  # in the order of making
        if (kind, name) in shown:
            found[KINDS[kind]].append({"id": name, **graph.nodes[kind, name]})
    links = [[list(one), list(other)] for one in graph.nodes for other in graph.children.get(one, ())
             if one in shown and other in shown]  # fmt: skip
    return {"asked": {"kind": asked[0], "id": asked[1]}, **found, "links": links, "unknown": graph.unknown(shown)}


def lineage_tree(found: dict[str, Any]) -> Tree:
    """What `lineage` found, as a tree that begins with the data."""
    nodes = {(kind, node["id"]): node for kind, plural in KINDS.items() for node in found[plural]}
    children: dict[Key, list[Key]] = {}
    for one, other in found["links"]:
        children.setdefault(tuple(one), []).append(tuple(other))
    asked = (found["asked"]["kind"], found["asked"]["id"])
    made = {child for below in children.values() for child in below}
    page = Tree("", hide_root=True)
    said: set[Key] = set()

    def grow(tree: Tree, key: Key) -> None:
        again = key in said
        said.add(key)
        lines = _words(key[0], nodes[key])
        label = Text.assemble((lines[0], "bold" if key == asked else ""), "  <- asked for" if key == asked else "")
        below = tree.add(label.append("  (see above)") if again else label)
        if not again:
            for line in lines[1:]:
                label.append(f"\n{line}", "dim")
            for child in children.get(key, ()):
                grow(below, child)

    for key in nodes:
        if key not in made:
            grow(page, key)
    return page


class _Graph:
    """All that a store and its MLflow know. nodes: {(kind, id): facts}, in the order of making."""

    def __init__(self, store: Path, mlflow: Tracker):
        self.store, self.mlflow = store, mlflow
        self.nodes: dict[Key, dict[str, Any]] = {}
        self.children: dict[Key, list[Key]] = {}
        self.parents: dict[Key, list[Key]] = {}
        versions = _versions(mlflow)
        for record in _records(store, "ingest"):
            result = record["result"]
            facts = {"name": result["name"], "images": result["images"], "classes": result["classes"],
                     "when": record["finished"], "folder": record["folder"]}  # fmt: skip
            self._add("dataset", result["digest"], facts)
        trainings = {record["result"]["run_id"]: record for record in _records(store, "train")}
        for run_id in [*trainings, *dict.fromkeys(version["run_id"] for version in versions)]:
            if run_id and ("run", run_id) not in self.nodes:
                self._add_run(run_id, trainings.get(run_id))
        for version in versions:
            self._add_version(version)
        for record in _records(store, "predict"):
            self._add_table(Path(record["folder"]), record)

    def find(self, what: str) -> Key:
        """The node that is meant; UserError if there is none, or more than one."""
        if what.startswith("models:/"):
            return "version", self._version_named(what)
        place = Path(what)
        if place.is_dir() or place.is_file():
            return self._found_at(place if place.is_dir() else place.parent)
        if re.fullmatch(r"[0-9a-f]{4,64}", what):
            keys = [key for key in self.nodes if key[0] != "version" and Path(key[1]).name.startswith(what)]
            if not keys and self._add_run(what, None):
                keys = [("run", what)]
            if len(keys) > 1:
                raise UserError(
                    f"{what} could be {' or '.join(f'{kind} {Path(name).name}' for kind, name in keys)}; "
                    "write more of it.", 2,
                )  # fmt: skip
            if keys:
                return keys[0]
        raise UserError(
            f"Neither {self.store} nor MLflow at {self.mlflow} knows {what!r}; give the digest of a dataset or of "
            "weights, a run's id, models:/NAME/3, models:/NAME@champion, or a folder of the store.", 2,
        )  # fmt: skip

    def reached(self, start: Key, by: dict[Key, list[Key]]) -> set[Key]:
        """A node, and all that parents or children lead to."""
        seen, todo = {start}, [start]
        while todo:
            new = [key for key in by.get(todo.pop(), ()) if key not in seen]
            seen.update(new)
            todo += new
        return seen

    def unknown(self, shown: set[Key]) -> list[str]:
        """What the chain lacks, as sentences."""
        said = []
        for kind, name in self.nodes:
            if (kind, name) in shown and (lacks := self.nodes[kind, name].get("unknown")):
                said.append(lacks)
        return [*said, ELSEWHERE]

    def _add(self, kind: str, name: str, facts: dict[str, Any]) -> Key:
        self.nodes.setdefault((kind, name), facts)
        return kind, name

    def _link(self, one: Key, other: Key) -> None:
        if other not in self.children.setdefault(one, []):
            self.children[one].append(other)
            self.parents.setdefault(other, []).append(one)

    def _dataset(self, name: str) -> Key:
        lacks = f"Dataset {name} was not read in this store: its name and images are not known here."
        return self._add("dataset", name, {"unknown": lacks})

    def _weights(self, name: str) -> Key:
        return self._add("weights", name, {})

    def _add_run(self, run_id: str, record: dict[str, Any] | None) -> Key | None:
        """A run with what it started from and what came of it; None if neither store nor MLflow has it."""
        facts, dataset = _run_facts(self.mlflow, run_id)
        if record is None and facts is None:
            return None
        if record is not None:
            dataset = record["inputs"]["dataset"]
            if facts is None:
                lacks = f"MLflow at {self.mlflow} does not have run {run_id}: its code is not known."
                facts = {"stage": "train", "changed": _changed(flatten(record["settings"])), "unknown": lacks}
            facts |= {"when": record["finished"], "AP": record["result"].get("AP"), "folder": record["folder"]}
        elif facts["stage"] == "train":
            facts["unknown"] = f"Run {run_id} is of another store: what else it left is not known here."
        parents = [self._dataset(dataset)] if dataset else []
        for given in ("init_from", "backbone_weights"):
            if record is not None and given in record["inputs"]:
                parents.append(self._weights(record["inputs"][given]))
        run = self._add("run", run_id, facts)
        for parent in parents:
            self._link(parent, run)
        if record is not None:
            checkpoint = Path(record["folder"]) / "checkpoint"
            if (checkpoint / "model.safetensors").is_file():
                self._link(run, self._weights(weights_digest(checkpoint)))
            else:
                facts["unknown"] = f"{checkpoint} is gone: which weights run {run_id} made is not known here."
        return run

    def _add_version(self, version: dict[str, Any]) -> None:
        weights, run, dataset = self._weights(version["weights"]), ("run", version["run_id"]), version["dataset"]
        if run not in self.nodes:
            version["unknown"] = f"MLflow at {self.mlflow} does not have run {version['run_id']} of {version['uri']}."
        elif not self.parents.get(weights) and self.nodes[run]["stage"] != "import":
            self._link(run, weights)
        made = self._add("version", version.pop("uri"), version)
        self._link(weights, made)
        known = self.reached(weights, self.parents)
        if run in self.nodes and run not in known:  # it registered what another run trained, or nobody knows who did
            self._link(run, made)
        if dataset and ("dataset", dataset) not in known:  # the data that it was measured on
            self._link(self._dataset(dataset), made)

    def _add_table(self, folder: Path, record: dict[str, Any]) -> Key:
        (name, number), weights = record["inputs"]["model"], record["inputs"]["weights"]
        result = record["result"]
        facts = {"model": name, "version": number, "weights": weights, "images": result["images"],
                 "detections": sum(result["detections"].values()), "when": record["finished"],
                 "place": result["folder"]}  # fmt: skip
        version = ("version", f"models:/{name}/{number}")
        same = version in self.nodes and self.nodes[version]["weights"] == weights
        if not same and number.isdecimal():
            lacks = f"MLflow at {self.mlflow} has no version {number} of {name!r} with the weights that made {folder}."
            facts["unknown"] = lacks
        made_by = self._weights(weights)
        table = self._add("table", str(folder), facts)
        self._link(version if same else made_by, table)
        return table

    def _version_named(self, uri: str) -> str:
        match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
        if not match:
            raise UserError(f"{uri} is not a model; write models:/NAME@champion or models:/NAME/3.", 2)
        name, alias, number = match.groups()
        for (kind, found), facts in self.nodes.items():
            if kind != "version" or facts["name"] != name:
                continue
            if facts["version"] == number or alias in facts["aliases"]:
                return found
        wanted = f"with the alias {alias!r}" if alias else f"version {number}"
        raise UserError(f"MLflow at {self.mlflow} has no model {name!r} {wanted}.", 2)

    def _found_at(self, folder: Path) -> Key:
        """A folder of the store (or of another), or a checkpoint."""
        folder = folder.resolve()
        for (kind, name), facts in self.nodes.items():
            if kind == "table" and str(folder) in (name, facts["place"]):
                return kind, name
        if (folder / "manifest.json").is_file():  # another store's
            manifest = read_json(folder / "manifest.json")
            inputs = {"model": [manifest["model"]["name"], str(manifest["model"]["version"])],
                      "weights": manifest["weights_sha256"]}  # fmt: skip
            result = {**manifest, "folder": str(folder)}
            return self._add_table(folder, {"inputs": inputs, "result": result, "finished": None})
        if (folder / "model.safetensors").is_file():
            return self._weights(weights_digest(folder))
        if (folder / "stage.json").is_file():
            record = {**read_json(folder / "stage.json"), "folder": str(folder)}
            if record["stage"] == "ingest":
                return self._dataset(record["result"]["digest"])
            if record["stage"] == "train" and (run := self._add_run(record["result"]["run_id"], record)):
                return run
            if record["stage"] == "evaluate":
                return self._weights(record["inputs"]["weights"])
        raise UserError(
            f"{folder} is no prediction, checkpoint, evaluation, training or dataset of a store; give one of these.", 2
        )


def _tracker(settings: RunSettings, store: Path) -> Tracker:
    data = latest(store, "ingest")
    return tracker(settings, store, data["result"]["name"] if data else "detr")


def _champion_of(settings: RunSettings, store: Path) -> str:
    data = latest(store, "ingest")
    if data is None:
        raise UserError("This store holds no dataset, so there is no champion; say what to follow.", 2)
    return f"models:/{registered_name(settings, data['result']['name'])}@{CHAMPION}"


def _records(store: Path, stage: str) -> list[dict[str, Any]]:
    """The finished stages of that name in the store, the oldest first."""
    return sorted(records(store, stage), key=lambda record: record["finished"])


def _run_facts(mlflow: Tracker, run_id: str) -> tuple[dict[str, Any] | None, str | None]:
    """What MLflow says of a run, and the digest of the dataset it was trained on; None if it has no such run."""
    from mlflow.exceptions import MlflowException

    client = mlflow.client()
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None, None
    dataset = None
    for output in run.outputs.model_outputs if run.outputs else []:
        dataset = client.get_logged_model(output.model_id).tags.get("detr.dataset_digest", dataset)
    tags = run.data.tags
    code = tags.get("changed.env.code") or tags.get("env.code")
    facts = {"name": run.info.run_name, "stage": tags.get("detr.stage"), "status": run.info.status, "code": code,
             "changed": _changed({key: _value(text) for key, text in run.data.params.items()})}  # fmt: skip
    return facts, dataset


def _changed(told: dict[str, Any]) -> dict[str, Any]:
    """Of settings by dotted name those that shape a model and are not the default, nor the data's, as classes are."""
    usual = flatten(RunSettings().model_dump(mode="json"))
    del usual["model.num_classes"]
    return {key: value for key, value in told.items()
            if key.split(".")[0] in SHAPES_A_MODEL and key in usual and value != usual[key]}  # fmt: skip


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _versions(mlflow: Tracker) -> list[dict[str, Any]]:
    """All registered versions of detectors, the oldest first, with the times each was champion."""
    client, found, token = mlflow.client(), [], None
    while True:
        page = client.search_model_versions(max_results=1000, page_token=token)
        found += [version for version in page if "model.safetensors_sha256" in version.tags]
        token = page.token
        if not token:
            break
    found.sort(key=lambda version: (version.creation_timestamp, int(version.version)))
    out = []
    for name in dict.fromkeys(version.name for version in found):
        mine = [version for version in found if version.name == name]
        aliases = {alias: str(of) for alias, of in client.get_registered_model(name).aliases.items()}
        moves = history(mlflow, name)
        for version in mine:
            tags, number = version.tags, str(version.version)
            out.append({
                "uri": f"models:/{name}/{number}", "name": name, "version": number, "run_id": version.run_id,
                "weights": tags["model.safetensors_sha256"], "dataset": tags.get("dataset_digest"),
                "AP": _finite(tags.get("ap")), "split": tags.get("split"), "verdict": tags.get("verdict"),
                "reason": tags.get("verdict_reason"), "champion": champion_times(moves, number, aliases.get(CHAMPION)),
                "aliases": sorted(alias for alias, of in aliases.items() if of == number),
            })  # fmt: skip
    return out


def champion_times(moves: list[dict[str, Any]], version: str, now: str | None) -> list[dict[str, str | None]]:
    """When a version was champion: [{"since", "until"}], until None for now.

    moves: of `history`, the oldest first; "promoted", "rolled back" and "found" give the alias to the version, anything
    else leaves it where it is. now: the version that has the alias. Where that is not the one the last move gave it to,
    somebody moved or deleted the alias since, and when is UNKNOWN.
    """
    times: list[dict[str, str | None]] = []
    standing = None
    by_hand = {"what": "found", "version": now, "when": UNKNOWN}
    for move in [*moves, by_hand]:
        if move["what"] not in ("promoted", "rolled back", "found") or move["version"] == standing:
            continue
        if standing == version:
            times[-1]["until"] = move["when"]
        standing = move["version"]
        if standing == version:
            times.append({"since": move["when"], "until": None})
    return times


def _finite(text: str | None) -> float | None:
    """The number of a tag; None without one, and for the nan of a version without ground truth."""
    number = float(text or "nan")
    return number if math.isfinite(number) else None


def _time_in_words(time: dict[str, str | None]) -> str:
    since, until = time["since"], time["until"] or "now"
    if until == UNKNOWN:
        return f"champion from {since} until unknown (its alias was moved or deleted by hand)"
    if since == UNKNOWN:
        return f"champion since unknown to {until} (the alias was moved to it by hand)"
    return f"champion from {since} to {until}"


def _words(kind: str, node: dict[str, Any]) -> list[str]:
    """What is known of a node, a line each."""
    if kind == "dataset":
        if "name" not in node:
            return [f"dataset {node['id']}"]
        images = ", ".join(f"{count} {split}" for split, count in node["images"].items())
        return [f"dataset {node['id']}", f"{node['name']}: {node['classes']} classes, images {images}",
                f"read {node['when']}, {node['folder']}"]  # fmt: skip
    if kind == "run":
        changed = ", ".join(f"{key}={value}" for key, value in node["changed"].items()) or "none"
        ap = f", AP {node['AP']:.4f} in validation" if node.get("AP") is not None else ""
        ended = f", {node['when']}" if "when" in node else ""
        name = " ".join(filter(None, [node["stage"], node.get("name")]))
        code = node.get("code") or "unknown"
        return [f"run {node['id']}", f"{name}{ended}{ap}", f"code: {code}",
                f"settings that are not the default: {changed}"]  # fmt: skip
    if kind == "weights":
        return [f"weights {node['id']}"]
    if kind == "version":
        split = node["split"]
        ap = "AP unknown" if split is None else f"no ground truth on {split}"
        if node["AP"] is not None:
            ap = f"AP {node['AP']:.4f} on {split}"
        times = [_time_in_words(time) for time in node["champion"]]
        also = [f"alias {alias}" for alias in node["aliases"] if alias != CHAMPION or not node["champion"]]
        return [f"version {node['version']} of {node['name']}", ", ".join([ap, *times, *also]),
                *([node["reason"]] if node["reason"] else ["no verdict yet"])]  # fmt: skip
    when = f", {node['when']}" if node["when"] else ""
    by = f"{node['model']} version {node['version']}"
    return [f"table {node['id']}", f"{node['images']} images, {node['detections']} detections by {by}{when}"]

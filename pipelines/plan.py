"""Plan, attempt, commit: how batch inference counts every image once, whatever dies on the way.

An output folder, local or on S3, holds

    plan.json                      the recipe: all that makes the rows; written once, and another one is refused
    0001/plan.json                 a run: its frozen listing, cut into shards; who writes it first decides
    0001/listing-00000-*.parquet   its images in order of key, SHARDS_PER_LISTING shards to a file, one to a row group
    0001/part-00012-*.parquet      the rows of a shard, named by their digest: two attempts at it write the same
    0001/commit-ID-00012.json      names the part that counts, create-only, with its counts and digest; ID: of the plan
    manifest.json                  names the plans and parts of all runs that are complete

Whoever follows the manifest sees each image once. A later run lists the images anew and takes those that no run before
had; where an image changed, its old row is taken out of its part (kept-*.parquet). Where a store cannot create a file
but once, two drivers may each work at a plan of their own; the first manifest says which one counts.
"""
from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.listing import Image
from pipelines.settings import UserError, digest, flatten
from pipelines.storage import TRY_AGAIN, Folder

DETECTIONS = pa.schema(
    [
        ("image_key", pa.string()),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("status", pa.string()),  # "ok", or why there are no detections
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),  # xyxy, pixels of the stored image
        ("scores", pa.list_(pa.float32())),
        ("category_ids", pa.list_(pa.int64())),
        ("category_names", pa.list_(pa.string())),
        ("model_name", pa.string()),
        ("model_version", pa.string()),
        ("plan_id", pa.string()),
    ]
)
LISTING = pa.schema(
    [
        ("key", pa.string()),
        ("uri", pa.string()),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("run", pa.int32()),  # whose part holds an older row of this image, or null
        ("shard", pa.int32()),
    ]
)
SHARDS_PER_LISTING = 16
AT_ONCE = 16  # requests to a store
BINS = 10  # of the scores' histogram
T = TypeVar("T")


def claim(folder: Folder, recipe: dict[str, Any]) -> None:
    """Make an output folder this recipe's; raises UserError as `refuse_other`."""
    if not folder.create("plan.json", _json(recipe)):
        refuse_other(folder, recipe)


def refuse_other(folder: Folder, recipe: dict[str, Any]) -> None:
    """Raise UserError (exit code 2) where an output folder holds results of another recipe."""
    there = _load(folder, "plan.json") or recipe
    if there != recipe:
        mine, other = flatten(recipe), flatten(there)
        key = next(key for key in sorted({**mine, **other}) if mine.get(key) != other.get(key))
        raise UserError(
            f"{folder.uri} holds results of another plan ({key} was {other.get(key)!r}, now {mine.get(key)!r}); give "
            "another --output.", 2,
        )  # fmt: skip


def load_manifest(folder: Folder) -> dict[str, Any] | None:
    """The manifest of the runs that are complete, or None."""
    return _load(folder, "manifest.json")


def begun_plan(folder: Folder, manifest: dict[str, Any] | None) -> dict[str, Any] | None:
    """The plan of the run after the complete ones, where it was begun."""
    return _load(folder, f"{_run(len(manifest['plans']) + 1 if manifest else 1)}/plan.json")


def known_images(folder: Folder, manifest: dict[str, Any], again: bool) -> Iterator[tuple[str, str, int, int]]:
    """(key, etag, run, shard) of all images of the runs so far, older ones first; those of a shard are held at a time.

    again: without the etag for images that could not be had for no fault of their own (TRY_AGAIN): they count as
    changed.
    """
    parts = {(part["run"], part["shard"]): part for part in manifest["parts"]}
    for path in manifest["plans"]:
        plan = _load(folder, path)
        for shard in range(plan["shards"]):
            part = parts.get((plan["run"], shard))
            if part is None:  # later runs have all of its images, or it was not done when its run was stopped
                continue
            retry: set[str] = set()
            if again and part["again"]:
                rows = read_part(folder, part).select(["image_key", "status"]).to_pylist()
                retry = {row["image_key"] for row in rows if row["status"].startswith(TRY_AGAIN)}
            for image in images_of(folder, plan, shard):
                yield image["key"], "?" if image["key"] in retry else image["etag"], plan["run"], shard


def freeze(
    folder: Folder, run: int, recipe: dict[str, Any], images: Iterable[tuple[Image, int | None, int | None]],
    say: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:  # fmt: skip
    """Write the listing of a run, from what `Listing.images` yields, and its plan; where another driver was first, its.

    Returns {"format", "run", "id": digest of recipe and listing, "input_digest", "images", "replaced" (how many of them
    have a row of a run before), "shards", "images_per_shard", "listings": [{"path", "sha256"}]}. A file's worth of
    images is held at a time.
    """
    size, number, replaced, files, listed = recipe["images_per_shard"], 0, 0, [], hashlib.sha256()
    for some in _batched(images, size * SHARDS_PER_LISTING):
        rows = [
            {"key": x.key, "uri": x.uri, "etag": x.etag, "size": x.size, "run": of_run, "shard": of_shard}
            for x, of_run, of_shard in some
        ]
        for row in rows:
            listed.update(f"{row['key']}\0{row['etag']}\0{row['size']}\n".encode())
        data = _parquet(pa.Table.from_pylist(rows, schema=LISTING), size)
        name = f"{_run(run)}/listing-{len(files):05d}-{_sha256(data)[:16]}.parquet"
        folder.put(name, data)
        files.append({"path": name, "sha256": _sha256(data)})
        number += len(rows)
        replaced += sum(row["run"] is not None for row in rows)
        say(len(rows))
    plan = {
        "format": 1,
        "run": run,
        "id": digest({"recipe": recipe, "images": listed.hexdigest()}),
        "input_digest": listed.hexdigest(),
        "images": number,
        "replaced": replaced,
        "shards": -(-number // size),
        "images_per_shard": size,
        "listings": files,
    }
    folder.put(_plan(plan), _json(plan))
    folder.create(f"{_run(run)}/plan.json", _json(plan))
    return _load(folder, f"{_run(run)}/plan.json") or plan


def images_of(folder: Folder, plan: dict[str, Any], shard: int) -> list[dict[str, Any]]:
    """The images of a shard (rows of LISTING), in order of key."""
    at, group = divmod(shard, SHARDS_PER_LISTING)
    listed = plan["listings"][at]
    file = pq.ParquetFile(io.BytesIO(_listing(folder.uri, listed["path"], listed["sha256"])))
    return file.read_row_group(group).to_pylist()


def find_commit(folder: Folder, plan: dict[str, Any], shard: int) -> dict[str, Any] | None:
    """What some driver has committed of a shard, or None."""
    return _load(folder, _commit(plan, shard))


def commit(
    folder: Folder, plan: dict[str, Any], shard: int, images: list[dict[str, Any]], table: pa.Table,
    facts: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Write the rows of a shard and commit them; returns the commit that counts, another driver's if it was first.

    facts: what is to be known of this attempt (when, where, by which run), which is in no row. Raises RuntimeError
    unless the table has exactly the shard's images, in order; UserError where the store does not keep what it is given.
    """
    if table["image_key"].to_pylist() != [image["key"] for image in images]:
        raise RuntimeError(f"the rows of shard {shard} are not those of its images, or not in their order")
    data = _parquet(table)
    sha = _sha256(data)
    part = f"{_run(plan['run'])}/part-{shard:05d}-{sha[:16]}.parquet"
    folder.put(part, data)
    if folder.get(part) != data:
        raise UserError(f"{folder.place(part)} is not what was written to it; the storage is not to be trusted.")
    mine = {"format": 1, "plan": plan["id"], "shard": shard, "part": part, "sha256": sha, **counts(table), **facts}
    if folder.create(_commit(plan, shard), _json(mine)):
        return mine
    return find_commit(folder, plan, shard) or mine  # a part that does not count stays, and is named by none


class Done:
    """What is committed of a plan: by shard all that a manifest needs of it, and the counts of all."""

    def __init__(self) -> None:
        self.shards: dict[int, dict[str, Any]] = {}
        self.total = add({}, counts(DETECTIONS.empty_table()))

    def take(self, found: dict[str, Any]) -> None:
        """Note a commit."""
        self.shards[found["shard"]] = {key: found[key] for key in ("images", "again", "part", "sha256")}
        add(self.total, found)


def commits(folder: Folder, plan: dict[str, Any]) -> Done:
    """What is committed of a plan; a commit that is torn, or whose part is or is lost, is taken back."""

    def verified(name: str) -> dict[str, Any] | None:
        found = _load(folder, name)
        data = found and folder.get(found["part"])
        if data and _sha256(data) == found["sha256"]:
            return found
        folder.delete(name)
        return None

    done, names = Done(), folder.names(_commit(plan, 0)[: -len("00000.json")])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for some in _batched(names, 100 * AT_ONCE):
            for found in pool.map(verified, some):
                if found:
                    done.take(found)
    return done


def finish(
    folder: Folder, recipe: dict[str, Any], plan: dict[str, Any], done: Done, partial: bool = False
) -> dict[str, Any]:
    """Write the manifest that names the parts of this run, and of those before it; returns it.

    partial: the run ends here; the images of the shards that are not in `done` are left to a later one. Raises
    RuntimeError unless all shards are there otherwise, with as many rows as they have images.
    """
    size = plan["images_per_shard"]
    expected = {shard: min(size, plan["images"] - shard * size) for shard in range(plan["shards"])}
    if partial:
        expected = {shard: number for shard, number in expected.items() if shard in done.shards}
    if {shard: found["images"] for shard, found in done.shards.items()} != expected:
        raise RuntimeError(f"{folder.uri}: run {plan['run']} is not complete, or has rows that are not of its images")
    before = load_manifest(folder) or {"plans": [], "parts": [], **counts(DETECTIONS.empty_table())}
    if len(before["plans"]) >= plan["run"]:  # another driver was here
        return before
    parts, total = {(part["run"], part["shard"]): part for part in before["parts"]}, add({}, before)
    for place, keys in sorted(_replaced(folder, plan, done.shards).items()):
        old = read_part(folder, parts.pop(place))
        stays = old.filter(pc.invert(pc.is_in(old["image_key"], pa.array(sorted(keys)))))
        add(total, counts(old), -1)
        if len(stays):
            data, counted = _parquet(stays), counts(stays)
            run, shard = place
            name = f"{_run(plan['run'])}/kept-{run:04d}-{shard:05d}-{_sha256(data)[:16]}.parquet"
            folder.put(name, data)
            parts[place] = {"path": name, "rows": len(stays), "sha256": _sha256(data), "again": counted["again"],
                            "run": run, "shard": shard}  # fmt: skip
            add(total, counted)
    add(total, done.total)
    for shard, found in done.shards.items():
        parts[plan["run"], shard] = {
            "path": found["part"], "rows": found["images"], "sha256": found["sha256"], "again": found["again"],
            "run": plan["run"], "shard": shard,
        }  # fmt: skip
    named = [parts[place] for place in sorted(parts)]
    listed = [before["input_digest"], plan["input_digest"]] if before["plans"] else [plan["input_digest"]]
    manifest = {
        "format": 2,
        "plan": plan["id"],
        **_tidy(total),
        "input_digest": digest(listed, 64) if before["plans"] else listed[0],
        "output_digest": digest([part["sha256"] for part in named], 64),
        "model": recipe["model"],
        "weights_sha256": recipe["weights_sha256"],
        "score_threshold": recipe["score_threshold"],
        "score_thresholds": recipe["score_thresholds"],
        "plans": [*before["plans"], _plan(plan)],
        "parts": named,
    }
    if sum(part["rows"] for part in named) != manifest["images"]:
        raise RuntimeError(f"{folder.uri}: the parts hold other than the {manifest['images']} images counted")
    now = load_manifest(folder)
    if now and len(now["plans"]) >= plan["run"]:
        return now
    folder.put("manifest.json", _json(manifest))
    return manifest


def tables(uri: str, say: Callable[[int], None] = lambda rows: None) -> Iterator[pa.Table]:
    """The tables (DETECTIONS) of a finished prediction, part by part, verified.

    uri: its folder, local or on S3. Raises UserError if it is not finished or a part is not what was written.
    """
    folder = Folder(uri)
    manifest = load_manifest(folder)
    if manifest is None:
        raise UserError(f"{uri} holds no finished prediction (no manifest.json); run it again.", 2)
    for part in manifest["parts"]:
        yield read_part(folder, part)
        say(part["rows"])


def detections_of(uri: str) -> pa.Table:
    """The whole table (DETECTIONS) of a finished prediction, as `tables` gives it."""
    return pa.concat_tables([DETECTIONS.empty_table(), *tables(uri)])


def counts(table: pa.Table) -> dict[str, Any]:
    """What is told of rows: {"images", "ok", "again", "rejects", "detections", "scores", "squares"}.

    again: images that could not be had for no fault of their own; rejects: {kind of reason: n}; detections: {category
    name: n}; scores: n in each tenth; squares: {"detections": the sum over images of their number's square}.
    """
    statuses = table["status"].to_pylist()
    lists = table["category_names"].combine_chunks()
    scores = [0] * BINS
    for score in table["scores"].combine_chunks().flatten().to_pylist():
        scores[min(int(score * BINS), BINS - 1)] += 1
    return {
        "images": len(table),
        "ok": statuses.count("ok"),
        "again": sum(status.startswith(TRY_AGAIN) for status in statuses),
        "rejects": dict(Counter(_kind(status) for status in statuses if status != "ok")),
        "detections": dict(Counter(lists.flatten().to_pylist())),
        "scores": scores,
        "squares": {"detections": sum(number**2 for number in pc.list_value_length(lists).to_pylist())},
    }


def _kind(reason: str) -> str:
    """A reason without what is of one image alone."""
    return re.sub(r"\d+x\d+", "its size", re.sub(r" \(.*\)$", "", reason))


def add(total: dict[str, Any], more: dict[str, Any], times: int = 1) -> dict[str, Any]:
    """total plus what `counts` gave, in place."""
    for key in ("images", "ok", "again"):
        total[key] = total.get(key, 0) + times * more[key]
    for key in ("rejects", "detections", "squares"):
        found = total.setdefault(key, Counter())
        for name, number in more[key].items():
            found[name] += times * number
    total["scores"] = [a + times * b for a, b in zip(total.get("scores", [0] * BINS), more["scores"], strict=True)]
    return total


def _tidy(total: dict[str, Any]) -> dict[str, Any]:
    """Counts for people: the commonest reasons first, the classes by name."""
    rejects = sorted(((n, reason) for reason, n in total["rejects"].items() if n), key=lambda one: (-one[0], one[1]))
    return {
        "images": total["images"],
        "ok": total["ok"],
        "rejected": total["images"] - total["ok"],
        "again": total["again"],
        "rejects": {reason: n for n, reason in rejects},
        "detections": {name: n for name, n in sorted(total["detections"].items()) if n},
        "scores": total["scores"],
        "squares": dict(total["squares"]),
    }


def _replaced(folder: Folder, plan: dict[str, Any], done: Iterable[int]) -> dict[tuple[int, int], set[str]]:
    """The keys whose older rows are in parts of runs before, by run and shard of those."""
    found: dict[tuple[int, int], set[str]] = {}
    for shard in sorted(done) if plan["replaced"] else ():
        for image in images_of(folder, plan, shard):
            if image["run"] is not None:
                found.setdefault((image["run"], image["shard"]), set()).add(image["key"])
    return found


@lru_cache(maxsize=2)  # shard follows shard
def _listing(uri: str, path: str, sha256: str) -> bytes:
    data = Folder(uri).get(path)
    if data is None or _sha256(data) != sha256:
        raise UserError(f"{uri}/{path} is not what was written; give another --output.")
    return data


def _load(folder: Folder, name: str) -> Any:
    """What a JSON file says; None where there is none, or half of one, which goes.

    Half of one is left by a kill where a disk has no links.
    """
    data = folder.get(name)
    if data is None:
        return None
    try:
        return json.loads(data)
    except json.JSONDecodeError:
        folder.delete(name)
        return None


def read_part(folder: Folder, part: dict[str, Any]) -> pa.Table:
    """The rows (DETECTIONS) of a part that a manifest names; UserError where it is not what was written."""
    data = folder.get(part["path"])
    if data is None or _sha256(data) != part["sha256"]:
        raise UserError(f"{folder.place(part['path'])} is not what was written; delete {folder.uri} and predict again.")
    return pq.read_table(io.BytesIO(data), schema=DETECTIONS)


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    return iter(lambda: list(islice(items, size)), [])


def _plan(plan: dict[str, Any]) -> str:
    return f"{_run(plan['run'])}/plan-{plan['id']}.json"


def _commit(plan: dict[str, Any], shard: int) -> str:
    return f"{_run(plan['run'])}/commit-{plan['id']}-{shard:05d}.json"


def _run(number: int) -> str:
    return f"{number:04d}"


def _parquet(table: pa.Table, row_group_size: int | None = None) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=row_group_size, compression="zstd")
    return out.getvalue()


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

"""Plan, attempt, commit: whatever dies, and however many drivers work at it, a reader sees every image once."""
from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.listing import Image
from pipelines.plan import (
    DETECTIONS,
    Done,
    begun_plan,
    claim,
    commit,
    commits,
    counts,
    detections_of,
    find_commit,
    finish,
    freeze,
    images_of,
    known_images,
    load_manifest,
    tables,
)
from pipelines.settings import UserError
from pipelines.storage import Folder

RECIPE = {
    "format": 2, "model": {"name": "m", "version": "3"}, "weights_sha256": "w", "score_threshold": 0.5,
    "score_thresholds": {}, "images_per_shard": 4, "precision": "float32",
}  # fmt: skip
NOTHING = {"boxes": [], "scores": [], "category_ids": [], "category_names": []}
FACTS = {"finished": "now", "host": "here", "attempt": "a"}


def images(*names: str, etag: str = "e"):
    return [(Image(name, f"/in/{name}", etag, 10, None), None, None) for name in names]


def names(number: int, first: int = 0) -> list[str]:
    return [f"{at:03d}.png" for at in range(first, first + number)]


def rows(shard_images: list[dict], plan: dict, score: float = 0.9) -> pa.Table:
    """A dog on every image but those whose name has a 3, which are bad."""
    return pa.Table.from_pylist(
        [
            {
                "image_key": image["key"], "etag": image["etag"], "size": image["size"],
                **({"status": "bad", **NOTHING}
                   if "3" in image["key"] else
                   {"status": "ok", "width": 8, "height": 6, "boxes": [[0, 0, 8, 6]], "scores": [score],
                    "category_ids": [7], "category_names": ["dog"]}),
                "model_name": "m", "model_version": "3", "plan_id": plan["id"],
            }
            for image in shard_images
        ],
        schema=DETECTIONS,
    )  # fmt: skip


def work(folder: Folder, plan: dict, shards=None, score: float = 0.9, facts: dict = FACTS) -> Done:
    """Do shards of a plan, all by default; returns what is committed of these."""
    done = Done()
    for shard in range(plan["shards"]) if shards is None else shards:
        listed = images_of(folder, plan, shard)
        done.take(commit(folder, plan, shard, listed, rows(listed, plan, score), facts))
    return done


def runs(folder: Folder) -> tuple[int, dict | None]:
    """How many runs are complete, and the plan that was begun after them."""
    manifest = load_manifest(folder)
    return len(manifest["plans"]) if manifest else 0, begun_plan(folder, manifest)


def content(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(str(tmp_path / "out"))


def test_a_run_is_cut_into_shards_and_its_manifest_names_every_image_once(folder, tmp_path):
    claim(folder, RECIPE)
    assert runs(folder) == (0, None)
    plan = freeze(folder, 1, RECIPE, images(*names(10)))
    assert (plan["images"], plan["shards"]) == (10, 3)
    assert runs(folder) == (0, plan)
    assert [image["key"] for image in images_of(folder, plan, 1)] == names(4, 4)
    assert [image["uri"] for image in images_of(folder, plan, 2)] == ["/in/008.png", "/in/009.png"]
    with pytest.raises(UserError, match="no finished prediction"):
        detections_of(folder.uri)
    manifest = finish(folder, RECIPE, plan, work(folder, plan))
    assert runs(folder) == (1, None)
    table = detections_of(folder.uri)
    assert table["image_key"].to_pylist() == names(10) and table.schema.equals(DETECTIONS)
    assert (manifest["images"], manifest["ok"], manifest["rejected"]) == (10, 9, 1)
    assert manifest["rejects"] == {"bad": 1} and manifest["detections"] == {"dog": 9}
    assert manifest["scores"] == [0] * 8 + [9, 0] or manifest["scores"] == [0] * 9 + [9]
    seen = []
    assert sum(len(table) for table in tables(folder.uri, seen.append)) == sum(seen) == 10


def test_many_shards_are_found_in_their_listings(folder):
    plan = freeze(folder, 1, RECIPE, images(*names(200)))
    assert (plan["shards"], len(plan["listings"])) == (50, 4)
    found = [image["key"] for shard in range(50) for image in images_of(folder, plan, shard)]
    assert found == names(200)
    finish(folder, RECIPE, plan, work(folder, plan))
    known = list(known_images(folder, load_manifest(folder), True))
    assert known == [(name, "e", 1, at // 4) for at, name in enumerate(names(200))]


def test_another_recipe_is_refused_with_what_differs(folder):
    claim(folder, RECIPE)
    claim(folder, json.loads(json.dumps(RECIPE)))
    with pytest.raises(UserError, match=r"another plan \(model.version was '3', now '4'\); give another") as error:
        claim(folder, RECIPE | {"model": {"name": "m", "version": "4"}})
    assert error.value.exit_code == 2


def test_the_same_images_and_recipe_are_the_same_plan_and_bytes(tmp_path):
    places = [Folder(str(tmp_path / name)) for name in ("one", "other")]
    for place, facts in zip(places, (FACTS, {**FACTS, "host": "there", "finished": "later"}), strict=True):
        claim(place, RECIPE)
        plan = freeze(place, 1, RECIPE, images(*names(10)))
        shards = range(3) if facts is FACTS else (2, 0, 1)
        finish(place, RECIPE, plan, work(place, plan, shards, facts=facts))
    one, other = (content(tmp_path / name) for name in ("one", "other"))
    differ = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    assert differ == {f"0001/commit-{plan['id']}-0000{shard}.json" for shard in range(3)}
    others = [
        freeze(Folder(str(tmp_path / "c")), 1, RECIPE, images(*names(9), "010.png")),
        freeze(Folder(str(tmp_path / "d")), 1, RECIPE, images(*names(10), etag="f")),
        freeze(Folder(str(tmp_path / "e")), 1, RECIPE | {"score_threshold": 0.4}, images(*names(10))),
    ]
    assert len({plan["id"], *(other["id"] for other in others)}) == 4


def test_of_two_listings_the_first_counts(folder):
    first = freeze(folder, 1, RECIPE, images(*names(10)))
    assert freeze(folder, 1, RECIPE, images(*names(12))) == first
    assert [image["key"] for image in images_of(folder, first, 2)] == ["008.png", "009.png"]


def test_two_drivers_leave_one_result(folder):
    plan = freeze(folder, 1, RECIPE, images(*names(10)))
    work(folder, plan, [0, 1])
    assert find_commit(folder, plan, 1)["attempt"] == "a" and find_commit(folder, plan, 2) is None
    # Another one on other hardware, whose scores differ in the last digit, does all of them.
    two = work(folder, plan, score=0.90000004, facts={**FACTS, "attempt": "b"})
    assert [find_commit(folder, plan, shard)["attempt"] for shard in range(3)] == ["a", "a", "b"]
    assert vars(commits(folder, plan)) == vars(two)
    manifest = finish(folder, RECIPE, plan, two)
    assert finish(folder, RECIPE, plan, commits(folder, plan)) == manifest
    table = detections_of(folder.uri)
    assert table["image_key"].to_pylist() == names(10)
    assert len({scores[0] for scores in table["scores"].to_pylist() if scores}) == 2


def test_where_a_store_cannot_create_but_once_each_driver_has_a_plan_of_its_own(folder, monkeypatch):
    """Both are told that they were first; what one commits is no answer to the other's listing."""

    def overwrite(self, name, data):
        self.put(name, data)
        return True

    monkeypatch.setattr(Folder, "create", overwrite)
    one = freeze(folder, 1, RECIPE, images(*names(8)))
    other = freeze(folder, 1, RECIPE, images(*names(8)[:3], "002a.png", *names(8)[3:]))
    assert one["id"] != other["id"]
    mine = work(folder, one, [0])
    theirs = work(folder, other, [1, 2])
    assert commits(folder, one).shards.keys() == {0} and commits(folder, other).shards.keys() == {1, 2}
    with pytest.raises(RuntimeError, match="is not complete"):
        finish(folder, RECIPE, other, theirs)
    finish(folder, RECIPE, one, work(folder, one, [1]) and commits(folder, one))
    assert mine.shards[0] == commits(folder, one).shards[0]
    finish(folder, RECIPE, other, work(folder, other))  # too late
    assert detections_of(folder.uri)["image_key"].to_pylist() == names(8)
    known = {key for key, *_ in known_images(folder, load_manifest(folder), False)}
    assert known == set(names(8))  # so that a later run takes the image that only the other had


def test_an_answer_that_was_lost_does_not_take_the_part_back(folder, monkeypatch):
    """The store has kept the commit, and the client, trying again, is told that it is there."""
    plan = freeze(folder, 1, RECIPE, images(*names(4)))
    create = Folder.create

    def twice(self, name, data):
        return create(self, name, data) and create(self, name, data)

    monkeypatch.setattr(Folder, "create", twice)
    finish(folder, RECIPE, plan, work(folder, plan))
    assert len(detections_of(folder.uri)) == 4


def test_rows_that_are_not_the_shards_are_not_committed(folder):
    plan = freeze(folder, 1, RECIPE, images(*names(8)))
    listed = images_of(folder, plan, 0)
    table = rows(listed, plan)
    for wrong in (table.slice(0, 3), pa.concat_tables([table, table.slice(3)]), table.take([1, 0, 2, 3])):
        with pytest.raises(RuntimeError, match="not those of its images"):
            commit(folder, plan, 0, listed, wrong, FACTS)
    assert commits(folder, plan).shards == {}
    with pytest.raises(RuntimeError, match="is not complete"):
        finish(folder, RECIPE, plan, work(folder, plan, [0]))
    assert runs(folder) == (0, plan)


@pytest.mark.parametrize("fault", ["torn", "lost", "commit torn"])
def test_a_part_that_the_disk_lost_is_done_again(folder, tmp_path, fault):
    plan = freeze(folder, 1, RECIPE, images(*names(8)))
    done = work(folder, plan)
    part = tmp_path / "out" / done.shards[1]["part"]
    if fault == "commit torn":
        (tmp_path / "out" / "0001" / f"commit-{plan['id']}-00001.json").write_text('{"format": 1, "pl')
    elif fault == "lost":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-1])
    assert commits(folder, plan).shards.keys() == {0}
    assert find_commit(folder, plan, 1) is None
    work(folder, plan, [1])
    finish(folder, RECIPE, plan, commits(folder, plan))
    assert detections_of(folder.uri)["image_key"].to_pylist() == names(8)
    part.write_bytes(b"other")
    with pytest.raises(UserError, match="is not what was written"):
        detections_of(folder.uri)


def test_a_store_that_does_not_keep_what_it_is_given_is_said(folder, monkeypatch):
    plan = freeze(folder, 1, RECIPE, images(*names(4)))
    put = Folder.put
    monkeypatch.setattr(Folder, "put", lambda self, name, data: put(self, name, data[:-1]))
    with pytest.raises(UserError, match="is not to be trusted"):
        work(folder, plan)
    assert commits(folder, plan).shards == {}


def test_later_runs_add_what_is_new_and_replace_what_changed(folder, tmp_path):
    claim(folder, RECIPE)
    plan = freeze(folder, 1, RECIPE, images(*names(10)))
    finish(folder, RECIPE, plan, work(folder, plan))
    before = content(tmp_path / "out")
    # 001 and all of the second shard changed, 020 and 021 are new.
    changed = [(Image(name, f"/in/{name}", "f", 11, None), 1, at // 4) for at, name in enumerate(names(10))
               if name == "001.png" or 4 <= at < 8]  # fmt: skip
    plan = freeze(folder, 2, RECIPE, changed + images("020.png", "021.png"))
    assert runs(folder) == (1, plan)
    assert len(detections_of(folder.uri)) == 10  # readers see the run before until this one is complete
    manifest = finish(folder, RECIPE, plan, work(folder, plan))
    found = detections_of(folder.uri).to_pylist()
    assert sorted(row["image_key"] for row in found) == [*names(10), "020.png", "021.png"]
    assert {row["image_key"] for row in found if row["etag"] == "f"} == {"001.png", *names(4, 4)}
    assert (manifest["images"], manifest["ok"], manifest["rejects"]) == (12, 11, {"bad": 1})
    assert manifest["detections"] == {"dog": 11} and sum(manifest["scores"]) == 11
    after = content(tmp_path / "out")
    assert {name for name in before if after.get(name) != before[name]} == {"manifest.json"}
    known = {key for key, *_ in known_images(folder, load_manifest(folder), True)}
    assert known == {row["image_key"] for row in found}
    # And again one of those that were replaced, and one of a part that was rewritten.
    again = [(Image("001.png", "/in/001.png", "g", 11, None), 2, 0),
             (Image("002.png", "/in/002.png", "g", 9, None), 1, 0)]  # fmt: skip
    plan = freeze(folder, 3, RECIPE, again)
    manifest = finish(folder, RECIPE, plan, work(folder, plan))
    found = detections_of(folder.uri).to_pylist()
    assert sorted(row["image_key"] for row in found) == [*names(10), "020.png", "021.png"]
    assert {row["image_key"]: row["etag"] for row in found if row["etag"] == "g"}.keys() == {"001.png", "002.png"}
    assert manifest["images"] == len(found) == 12 and len(manifest["plans"]) == 3
    # A driver that is late with an older run leaves the newer manifest.
    late = json.loads(folder.get("0002/plan.json"))
    assert finish(folder, RECIPE, late, commits(folder, late)) == manifest


def test_a_run_that_ends_early_leaves_the_rest_to_the_next(folder):
    plan = freeze(folder, 1, RECIPE, images(*names(10)))
    manifest = finish(folder, RECIPE, plan, work(folder, plan, [0, 2]), partial=True)
    assert manifest["images"] == 6 and runs(folder) == (1, None)
    left = {key for key, *_ in known_images(folder, manifest, False)}
    assert left == {*names(4), *names(2, 8)}
    plan = freeze(folder, 2, RECIPE, images(*names(4, 4)))
    finish(folder, RECIPE, plan, work(folder, plan))
    assert sorted(detections_of(folder.uri)["image_key"].to_pylist()) == names(10)


def test_an_image_that_could_not_be_had_is_tried_again(folder):
    plan = freeze(folder, 1, RECIPE, images(*names(4)))
    listed = images_of(folder, plan, 0)
    found = rows(listed, plan).to_pylist()
    found[1] |= {**NOTHING, "status": "access to it is denied"}
    done = Done()
    done.take(commit(folder, plan, 0, listed, pa.Table.from_pylist(found, schema=DETECTIONS), FACTS))
    manifest = finish(folder, RECIPE, plan, done)
    assert manifest["again"] == 1 and manifest["rejects"] == {"access to it is denied": 1, "bad": 1}
    known = {key: etag for key, etag, *_ in known_images(folder, manifest, True)}
    assert [name for name in names(4) if known[name] != "e"] == ["001.png"]
    assert set(known) == set(names(4))
    assert {etag for _, etag, *_ in known_images(folder, manifest, False)} == {"e"}


def test_reasons_are_counted_by_their_kind():
    reasons = ["it cannot be decoded (truncated (25 bytes))", "it cannot be decoded (truncated (7 bytes))",
               "200x100 is more than the limit of 99 pixels", "20x100 is more than the limit of 99 pixels"]  # fmt: skip
    table = pa.Table.from_pylist([{"status": reason, **NOTHING} for reason in reasons], schema=DETECTIONS)
    assert counts(table)["rejects"] == {"it cannot be decoded": 2, "its size is more than the limit of 99 pixels": 2}

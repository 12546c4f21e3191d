"""A stage is done once for what goes into it, and again when that changes."""
from __future__ import annotations

import pytest

from pipelines.stage import read_json, run_stage


def test_the_same_work_is_done_once_and_changed_work_again(tmp_path):
    calls = []

    def work(folder):
        calls.append(folder)
        (folder / "out.txt").write_text("x")
        return {"n": len(calls)}

    first = run_stage(tmp_path, "demo", 1, {"a": 1}, {"data": "d"}, work)
    again = run_stage(tmp_path, "demo", 1, {"a": 1}, {"data": "d"}, work)
    assert (first["reused"], again["reused"]) == (False, True)
    assert first["result"] == again["result"] == {"n": 1}
    assert first["folder"] == again["folder"]
    for other in (("demo", 2, {"a": 1}, {"data": "d"}), ("demo", 1, {"a": 2}, {"data": "d"}),
                  ("demo", 1, {"a": 1}, {"data": "e"}), ("other", 1, {"a": 1}, {"data": "d"})):  # fmt: skip
        assert not run_stage(tmp_path, *other, work)["reused"]
    assert len(calls) == 5


def test_failed_work_leaves_no_record_and_keeps_its_folder_for_the_next_try(tmp_path):
    def fails(folder):
        (folder / "partial").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        run_stage(tmp_path, "demo", 1, {}, {}, fails)

    def goes_on(folder):
        return {"found": (folder / "partial").read_text()}

    record = run_stage(tmp_path, "demo", 1, {}, {}, goes_on)
    assert record["result"] == {"found": "half"} and not record["reused"]
    assert read_json(f"{record['folder']}/stage.json")["format"] == 1

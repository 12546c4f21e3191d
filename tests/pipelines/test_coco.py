from __future__ import annotations

import copy
import io
import json
import math
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.coco import read_coco, safe_join, split_train
from pipelines.settings import IngestSettings, UserError

GOOD = {
    "images": [
        {"id": 2, "file_name": "b.jpg", "width": 100, "height": 50},
        {"id": 1, "file_name": "sub/a.jpg", "width": 64, "height": 64},
    ],
    "annotations": [
        {"id": 10, "image_id": 1, "category_id": 7, "bbox": [1, 2, 3.5, 4], "area": 14, "iscrowd": 0},
        {"id": 11, "image_id": 1, "category_id": 3, "bbox": [0, 0, 64, 64], "area": 9, "iscrowd": 1},
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
}


@pytest.fixture
def write(tmp_path):
    def write(content, name="a.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


def changed(**changes):
    """GOOD with 'images.0.id' style places (double underscores in keywords) set; ... deletes."""
    content = copy.deepcopy(GOOD)
    for place, value in changes.items():
        *groups, last = [int(part) if part.isdigit() else part for part in place.split("__")]
        inner = content
        for group in groups:
            inner = inner[group]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    return content


def with_box(*boxes, **fields):
    content = copy.deepcopy(GOOD)
    content["annotations"] = [
        {"id": n, "image_id": 2, "category_id": 7, "bbox": list(box), **fields} for n, box in enumerate(boxes)
    ]
    return content


def rejects(coco):
    return [(row["file_name"], row["annotation_id"], row["reason"]) for row in coco.rejects()]


def test_a_good_file(write, tmp_path):
    coco = read_coco(write(GOOD), tmp_path)
    assert [image["id"] for image in coco.images] == [1, 2]
    assert coco.categories == [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]
    used, crowd = coco.annotations(0)
    assert used["box"] == [1, 2, 4.5, 6] and used["bbox"] == [1, 2, 3.5, 4] and used["reject"] is None
    assert crowd["reject"] == "crowd" and crowd["iscrowd"] is True and crowd["box"] is None and crowd["area"] == 9
    assert rejects(coco) == [("sub/a.jpg", 11, "crowd")]
    assert coco.annotations(1) == [] and coco.boxes == 1 and coco.clamped == 0


FAULTS = {
    "empty": (b"  \n", 2, "is empty"),
    "cut short": (b'{"images": [\n{"id": 1,', 2, "not JSON.* line 2, column"),
    "not UTF-8": (b'{"images": "\xff\xfe\xfa"}', 2, "not JSON"),
    "an image": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 2, "not JSON"),
    "too deep": (b'{"images": ' + b"[" * 200_000, 2, "not JSON"),
    "endless number": (b'{"images": ' + b"9" * 5000 + b"}", 2, "not JSON"),
    "a list": (b"[]", 2, "holds a list"),
    "null": (b"null", 2, "holds a null"),
    "nan": (b"NaN", 2, "holds a number"),
    "no images": (changed(images=...), 2, "no 'images'"),
    "no annotations": (changed(annotations=...), 2, "no 'annotations'"),
    "no categories": (changed(categories=...), 2, "no 'categories'"),
    "images an object": (changed(images={}), 2, "'images' is a JSON object"),
    "empty images": (changed(images=[]), 2, "'images' is empty"),
    "empty categories": (changed(categories=[]), 2, "'categories' is empty"),
    "image a text": (changed(images__1="x"), 2, r"images\[1\] is a text"),
    "annotation null": (changed(annotations__0=None), 2, r"annotations\[0\] is a null"),
    "category a number": (changed(categories__0=1), 2, r"categories\[0\] is a number"),
    "image without id": (changed(images__0__id=...), 2, r"images\[0\]: 'id' is missing"),
    "image id a text": (changed(images__0__id="0001"), 2, r"images\[0\]: 'id' is '0001'"),
    "image id true": (changed(images__0__id=True), 2, "'id' is True"),
    "image id too large": (changed(images__0__id=2**63), 2, "'id' is 9223"),
    "image id nan": (changed(images__0__id=math.nan), 2, "'id' is nan"),
    "same image id": (changed(images__0__id=1), 2, "'b.jpg' and 'sub/a.jpg' both have the id 1"),
    "no file name": (changed(images__0__file_name=...), 2, r"images\[0\] \(id 2\): 'file_name' is missing"),
    "file name a list": (changed(images__0__file_name=["b"]), 2, "'file_name' is"),
    "same file name": (changed(images__0__file_name="./sub//a.jpg"), 2, "images 2 and 1 both have the file name"),
    "no width": (changed(images__0__width=...), 2, "'width' is missing"),
    "width zero": (changed(images__0__width=0), 2, "'width' is 0; it must be a positive"),
    "height nan": (changed(images__0__height=math.nan), 2, "'height' is nan"),
    "height a fraction": (changed(images__0__height=1.5), 2, "'height' is 1.5"),
    "annotation without id": (changed(annotations__0__id=...), 2, r"annotations\[0\]: 'id' is missing"),
    "no image id": (changed(annotations__0__image_id=...), 2, r"annotations\[0\] \(id 10\): 'image_id' is missing"),
    "category id a text": (changed(annotations__0__category_id="cat"), 2, "'category_id' is 'cat'"),
    "no bbox": (changed(annotations__0__bbox=...), 2, "'bbox' is missing; it must be four numbers"),
    "bbox of three": (changed(annotations__0__bbox=[1, 2, 3]), 2, "'bbox' is"),
    "bbox of texts": (changed(annotations__0__bbox=["1", 2, 3, 4]), 2, "'bbox' is"),
    "area a text": (changed(annotations__0__area="9"), 2, "'area' is '9'"),
    "crowd 2": (changed(annotations__0__iscrowd=2), 2, "'iscrowd' is 2; it must be 0 or 1"),
    "crowd a list": (changed(annotations__0__iscrowd=[]), 2, "'iscrowd' is"),
    "no category name": (changed(categories__0__name=...), 2, r"categories\[0\] \(id 7\): 'name' is missing"),
    "name half a character": (changed(categories__0__name="\ud800"), 2, "'name' is"),
    "same category id": (changed(categories__0__id=3), 2, "'cat' and 'dog' both have the id 3"),
}


@pytest.mark.parametrize("content,exit_code,match", FAULTS.values(), ids=FAULTS.keys())
def test_a_faulty_file_is_refused_in_one_sentence(write, tmp_path, content, exit_code, match):
    path = write(content)
    with pytest.raises(UserError, match=match) as error:
        read_coco(path, tmp_path)
    message = str(error.value)
    assert error.value.exit_code == exit_code
    assert str(path) in message and "\n" not in message and len(message) < 400 and message.isprintable()


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no annotation file") as error:
        read_coco(tmp_path / "none.json", tmp_path)
    assert error.value.exit_code == 2
def test_a_pipe_is_no_annotation_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for name, match in (("pipe.json", "is not a file, but a pipe"), (".", "is a folder; name an annotation file")):
        with pytest.raises(UserError, match=match) as error:
            read_coco(tmp_path / name, tmp_path)
        assert error.value.exit_code == 2


OUTSIDE = ["/etc/passwd", "../x.jpg", "a/../../x.jpg", "..", "C:\\x.jpg", "C:x.jpg", "a\\b.jpg", "\\\\host\\x", ""]
OUTSIDE += [".", "a/", "a\0.jpg", "\udcff.jpg", "link.jpg", "out/x.jpg"]


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_a_file_name_outside_the_folder_refuses_the_whole_file(write, tmp_path, name):
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "x.jpg").write_bytes(b"secret")
    (root / "link.jpg").symlink_to(tmp_path / "x.jpg")
    (root / "out").symlink_to(tmp_path)
    with pytest.raises(ValueError):
        safe_join(root, name)
    with pytest.raises(UserError, match=r"images\[0\] \(id 2\) has the file name") as error:
        read_coco(write(changed(images__0__file_name=name)), root)
    assert error.value.exit_code == 2 and str(error.value).isprintable()


def test_names_that_stay_inside(tmp_path):
    root = tmp_path / "real"
    (root / "sub").mkdir(parents=True)
    (root / "a.jpg").write_bytes(b"")
    (root / "sub" / "link.jpg").symlink_to(root / "a.jpg")
    linked = tmp_path / "images"
    linked.symlink_to(root)
    for name in ("a.jpg", "sub/link.jpg", "not there.jpg", "..a.jpg", "ü 1/日本.png", "x" * 3000):
        assert safe_join(linked, name) == linked / name


def reasons(write, tmp_path, content):
    coco = read_coco(write(content), tmp_path)
    return [row["reject"] for row in coco.annotations(1)]


@pytest.mark.parametrize(
    "box,reason",
    [
        ([1, 1, 0, 5], "no area"),
        ([1, 1, 5, -1], "negative"),
        ([math.nan, 1, 5, 5], "not finite"),
        ([1, 1, math.inf, 5], "not finite"),
        ([1, 1, 10**400, 5], "not finite"),
        ([100, 1, 5, 5], "nothing of the box is inside"),
        ([-5, 1, 5, 5], "nothing of the box is inside"),
        ([90, 1, 1e-9, 5], "nothing of the box is inside"),  # no width left in single precision
        ([1e308, 1, 1e308, 5], "nothing of the box is inside"),
    ],
)
def test_boxes_that_cannot_be_trained_on_are_kept_with_the_reason(write, tmp_path, box, reason):
    coco = read_coco(write(with_box(box, [1, 1, 5, 5], area=20)), tmp_path)
    bad, good = coco.annotations(1)
    assert reason in bad["reject"] and bad["box"] is None and good["reject"] is None
    assert rejects(coco) == [("b.jpg", 0, bad["reject"])] and coco.boxes == 1


def test_boxes_over_the_edge_are_cut_and_the_source_kept(write, tmp_path):
    boxes = [-5, 40, 20, 20], [0, 0, 100, 50], [-1e307, 0, 1.7e308, 50.5]
    coco = read_coco(write(with_box(*boxes, area=20)), tmp_path)
    over, exact, huge = coco.annotations(1)
    assert over["box"] == [0, 40, 15, 50] and over["bbox"] == [-5, 40, 20, 20]
    assert exact["box"] == [0, 0, 100, 50] and huge["box"] == [0, 0, 100, 50]
    assert coco.clamped == 2 and rejects(coco) == []


def test_boxes_over_the_edge_are_rejected_where_that_is_asked(write, tmp_path):
    boxes = [-5, 40, 20, 20], [0, 0, 100, 50], [99, 0, 2, 50.5]
    coco = read_coco(write(with_box(*boxes, area=20)), tmp_path, IngestSettings(over_edge="reject"))
    over, exact, rounded = coco.annotations(1)
    assert rejects(coco) == [("b.jpg", over["id"], "the box reaches over the image's edge")]
    assert exact["reject"] is None and rounded["box"] == [99, 0, 100, 50]


def test_area_is_optional_and_whole_floats_are_whole(write, tmp_path):
    content = with_box([1, 1, 4, 5])
    content["annotations"][0]["image_id"] = 2.0
    row, = read_coco(write(content), tmp_path).annotations(1)
    assert row["area"] == 20 and row["iscrowd"] is False


def test_dangling_and_repeated_annotations_are_rejected(write, tmp_path):
    content = with_box([1, 1, 4, 5], [1, 1, 4, 5], [1, 1, 4, 5], [1, 1, 4, 5])
    content["annotations"][1]["id"] = 0
    content["annotations"][2]["image_id"] = 99
    content["annotations"][3]["category_id"] = 99
    coco = read_coco(write(content), tmp_path)
    assert [row["reject"] for row in coco.annotations(1)] == [
        None,
        "the annotation id was used before",
        "there is no category 99",
    ]
    assert ("", 2, "there is no image 99") in rejects(coco) and len(rejects(coco)) == 3


def test_random_damage_never_gives_a_traceback(write, tmp_path):
    """Every value of a good file replaced by every kind of wrong one: a CocoFile or a UserError."""
    junk = [None, True, -1, 0, 1.5, 1e400, math.nan, 10**400, "", "x", "\ud800", "a\nb", [], [[]], {}, {"a": []}]

    def places(value, place=()):
        yield place
        if isinstance(value, dict | list):
            for key in value if isinstance(value, dict) else range(len(value)):
                yield from places(value[key], (*place, key))

    outcomes = set()
    for place in list(places(GOOD))[1:]:
        for value in junk:
            content = copy.deepcopy(GOOD)
            inner = content
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            try:
                read_coco(write(content), tmp_path)
                outcomes.add("read")
            except UserError as error:
                outcomes.add("refused")
                assert str(error).isprintable(), (place, value)
    assert outcomes == {"read", "refused"}


@pytest.fixture
def pictures(tmp_path):
    """40 pictures of noise; 1 and 2 are the same file, 3 and 4 the same picture at two qualities."""
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    images = []
    for n in range(1, 41):
        if n not in (2, 4):
            coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((64, 64))
        quality = 40 if n == 4 else 95
        coarse.save(root / f"{n}.jpg", quality=quality)
        images.append({"id": n, "file_name": f"{n}.jpg", "width": 64, "height": 64})
    annotations = [
        {"id": n, "image_id": n, "category_id": 3, "bbox": [0, 0, 9, 9 if n != 7 else 0]} for n in range(1, 41)
    ]
    annotations.append({"id": 99, "image_id": 99, "category_id": 3, "bbox": [0, 0, 9, 9]})
    content = {"images": images, "annotations": annotations, "categories": GOOD["categories"]}
    path = tmp_path / "all.json"
    path.write_text(json.dumps(content))
    return path, root


def ids(coco):
    return [image["id"] for image in coco.images]


def test_split_keeps_lookalikes_together_and_loses_nothing(pictures):
    path, root = pictures
    coco = read_coco(path, root)
    splits = []
    for seed in range(12):
        train, val = split_train(coco, 0.25, seed, root, 10**6)
        assert sorted(ids(train) + ids(val)) == list(range(1, 41)) and len(ids(val)) == 10
        for twins in ({1, 2}, {3, 4}):
            assert twins <= set(ids(train)) or twins <= set(ids(val))
        for part in (train, val):
            rows = [row["image_id"] for n in range(len(part.images)) for row in part.annotations(n)]
            assert rows == ids(part)
        assert train.boxes + val.boxes == coco.boxes
        assert sorted(rejects(train) + rejects(val)) == sorted(rejects(coco))
        splits.append(tuple(ids(val)))
    assert tuple(ids(split_train(coco, 0.25, 0, root, 10**6)[1])) == splits[0]
    assert len(set(splits)) == 12
    assert any({1, 2} <= set(val) for val in splits)


def test_split_of_unreadable_missing_and_lookalike_images(pictures):
    path, root = pictures
    coco = read_coco(path, root)
    white = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(white, "PNG")
    for n in range(1, 39):
        (root / f"{n}.jpg").write_bytes(white.getvalue() + bytes([n]))  # one picture, different files
    (root / "39.jpg").write_bytes(b"not an image")
    (root / "40.jpg").unlink()
    train, val = split_train(coco, 0.25, 0, root, 10**6)
    assert len(ids(val)) == 10 and len(ids(train)) == 30

    for n in range(1, 41):
        (root / f"{n}.jpg").write_bytes(white.getvalue())
    with pytest.raises(UserError, match="no two different images"):
        split_train(coco, 0.25, 0, root, 10**6)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5,
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_files_are_read_or_refused_in_one_sentence(write, tmp_path, data):
    """Records of a good file with junk for some values, in any order, cut short or with a byte changed."""
    content = copy.deepcopy(GOOD)
    for key in data.draw(st.permutations(list(content))):
        content[key] = content.pop(key)
        for record in content[key]:
            for member in data.draw(st.lists(st.sampled_from(sorted(record)), max_size=1)):
                record[member] = data.draw(JUNK)
    text = bytearray(json.dumps(content).encode())
    if data.draw(st.booleans()):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    text = text[: data.draw(st.none() | st.integers(0, len(text)))]
    try:
        coco = read_coco(write(bytes(text)), tmp_path)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 400
    else:
        kept = sum(len(coco.annotations(n)) for n in range(len(coco.images)))
        loose = sum(row["record"] is not None for row in coco.rejects())
        assert kept + loose == len(json.loads(text)["annotations"])
        assert coco.boxes + len(list(coco.rejects())) == kept + loose

"""Pascal VOC's and YOLO's folders become the COCO files that say the same."""
from __future__ import annotations

import re
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.folders import other_layout, read_voc, read_yolo
from pipelines.ingest import ingest, source
from pipelines.settings import DataSettings, RunSettings, UserError, override_settings
from pipelines.shards import read_split
from pipelines.stage import read_json

OBJECT = """<object><name>{}</name><pose>Left</pose><difficult>{}</difficult>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def picture(path, size=(100, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 60 + len(path.name)).save(path)


@pytest.fixture
def voc(tmp_path):
    """a.jpg with two cats, one difficult, b.png (of another name in its file) with a dog, c.jpg with nothing."""
    folder = tmp_path / "voc"
    objects = {
        "a": ("a.jpg", OBJECT.format("cat", 0, 1, 1, 10, 20), OBJECT.format("cat", 1, 11, 1, 20, 20)),
        "b": ("c:\\photos\\b.jpeg", OBJECT.format("dog", 0, 1, 1, 100, 50)),
        "c": ("c.jpg",),
    }
    for stem, (name, *inside) in objects.items():
        picture(folder / "JPEGImages" / ("b.png" if stem == "b" else f"{stem}.jpg"))
        write(folder / "Annotations" / f"{stem}.xml", f"<annotation><folder>x</folder><filename>{name}</filename>"
              f"<size><width>100</width><height>50</height></size>{''.join(inside)}</annotation>")  # fmt: skip
    return folder


@pytest.fixture
def yolo(tmp_path):
    """As exported by others: ../train/images in data.yaml; a box, a polygon, an image without objects."""
    folder = tmp_path / "yolo"
    for split, name in (("train", "a.jpg"), ("train", "sub/b.jpg"), ("valid", "c.png")):
        picture(folder / split / "images" / name)
    write(folder / "train" / "labels" / "a.txt", "1 0.5 0.5 0.2 0.4\n\n0 0.1 0.2 0.3 0.2 0.3 0.6\n")
    write(folder / "valid" / "labels" / "c.txt", "0 0.5 0.5 1 1\n")
    write(folder / "data.yaml", "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['dog', 'cat']\n")
    return folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def said(file):
    """{file name: [(class, box xyxy, why not)]}"""
    names = {category["id"]: category["name"] for category in file.categories}
    return {
        image["file_name"]: [(names.get(a["category_id"]), a["box"], a["reject"]) for a in file.annotations(n)]
        for n, image in enumerate(file.images)
    }


def test_voc_counts_pixels_from_one_and_its_difficult_objects_are_crowds(voc):
    root, files = read_voc(str(voc), RunSettings())
    assert root == str(voc / "JPEGImages") and files.keys() == {"train"}
    assert said(files["train"]) == {
        "a.jpg": [("cat", [0, 0, 10, 20], None), ("cat", None, "crowd")],
        "b.png": [("dog", [0, 0, 100, 50], None)],
        "c.jpg": [],
    }
    assert files["train"].categories == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


def test_the_splits_of_voc(voc):
    write(voc / "ImageSets" / "Main" / "train.txt", "a\nc\n")
    write(voc / "ImageSets" / "Main" / "val.txt", "b 1\n")
    write(voc / "ImageSets" / "Main" / "dog_train.txt", "b -1\n")
    files = read_voc(str(voc), RunSettings())[1]
    assert {split: list(said(file)) for split, file in files.items()} == {"train": ["a.jpg", "c.jpg"], "val": ["b.png"]}
    assert files["train"].categories == files["val"].categories and files["train"].sha256 != files["val"].sha256


def test_yolo_has_boxes_and_polygons_in_shares(yolo):
    root, files = read_yolo(str(yolo), RunSettings())
    assert root == str(yolo) and files.keys() == {"train", "val"}
    found = said(files["train"])
    (cat, box, _), (dog, polygon, _) = found.pop("train/images/a.jpg")
    assert (cat, dog) == ("cat", "dog") and found == {"train/images/sub/b.jpg": []}
    assert box == pytest.approx([40, 15, 60, 35]) and polygon == pytest.approx([10, 10, 30, 30])
    assert said(files["val"]) == {"valid/images/c.png": [("dog", [0, 0, 100, 50], None)]}


def test_yolo_with_lists_of_files_or_classes_alone(yolo):
    write(yolo / "list.txt", "./valid/images/c.png\ntrain/images/a.jpg\n")
    write(yolo / "data.yaml", "train: list.txt\nnames: {0: dog, 1: cat}\n")
    assert list(said(read_yolo(str(yolo), RunSettings())[1]["train"])) == ["train/images/a.jpg", "valid/images/c.png"]
    (yolo / "data.yaml").unlink()
    write(yolo / "classes.txt", "dog\ncat\n")
    (yolo / "train" / "images").rename(yolo / "images")
    (yolo / "train" / "labels").rename(yolo / "labels")
    files = read_yolo(str(yolo), RunSettings())[1]
    assert list(said(files["train"])) == ["images/a.jpg", "images/sub/b.jpg", "valid/images/c.png"]
    assert files.keys() == {"train"} and files["train"].boxes == 3


@pytest.mark.parametrize(
    "file,text,match",
    [
        ("Annotations/a.xml", "<annotation><size>", "a.xml is not XML"),
        ("Annotations/a.xml", "<annotation/>", "a.xml has no size"),
        ("Annotations/a.xml", "<a><size><width>x</width></size></a>", "a.xml: size/width is 'x'; it must be a number"),
        ("Annotations/a.xml", "<a><size><width>0</width><height>5</height></size></a>", "that the image is 0x5"),
        ("Annotations/a.xml", "<a><size><width>9</width><height>9</height></size><object><name>x</name></object></a>",
         r"a.xml: object\[0\] has no bndbox"),
        ("ImageSets/Main/train.txt", "a\nnone\n", "train.txt names 'none', but there is no such .xml"),
        ("ImageSets/Main/test.txt", "a\n", "has test, but no train.txt"),
        ("ImageSets/Main/train.txt", "../../secret\n", "train.txt names '../../secret', but"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_voc_is_named(voc, file, text, match):
    write(voc / file, text)
    with pytest.raises(UserError, match=match) as error:
        read_voc(str(voc), RunSettings())
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "file,text,match",
    [
        ("train/labels/a.txt", "0 0.5 0.5 0.1\n", "a.txt, line 1: a class and 3 numbers"),
        ("train/labels/a.txt", "0 0 0 1 1\ncat 0 0 1 1\n", "a.txt, line 2: 'cat 0 0 1 1' holds what is no number"),
        ("data.yaml", "train: [", "data.yaml is not YAML"),
        ("data.yaml", "names: [a]\ndate: 2024-13-45", "data.yaml is not YAML: month must be in 1..12"),
        ("data.yaml", "[" * 3000, "data.yaml is not YAML"),
        ("data.yaml", "names: [a]\ntrain: train\nval: '[/none]'", None),
        ("data.yaml", "train: train/images", "data.yaml has no names"),
        ("data.yaml", "names: [a]", "does not say where train is"),
        ("data.yaml", "names: [a]\ntrain: none", "train is in 'none', but there is no image"),
        ("data.yaml", "names: [a]\ntrain: /etc", "train is in '/etc', but there is no image"),
        ("list.txt", "../x.jpg\n", "train is in 'list.txt', but there is no image"),
        ("train/labels/a.txt", "0.5 0 0 1 1\n", "line 1: the class is '0.5'; it must be a whole number"),
    ],
)
def test_what_is_wrong_in_yolo_is_named(yolo, file, text, match):
    write(yolo / file, text)
    if file == "list.txt":
        write(yolo / "data.yaml", "names: [a]\ntrain: list.txt")
    if match is None:
        assert read_yolo(str(yolo), RunSettings())[1].keys() == {"train"}
        return
    with pytest.raises(UserError, match=match):
        read_yolo(str(yolo), RunSettings())


def test_splits_that_would_share_their_images_are_refused(yolo):
    """A folder that is not there is looked for under the end of its name; both splits would find the other's."""
    (yolo / "train" / "images").rename(yolo / "images")
    shutil.rmtree(yolo / "valid")
    match = re.escape("train is in '../train/images' and val in '../valid/images', but both are found")
    with pytest.raises(UserError, match=match) as error:
        read_yolo(str(yolo), RunSettings())
    assert error.value.exit_code == 2
    write(yolo / "data.yaml", "train: images\nval: images\nnames: [dog, cat]\n")  # as small examples have it
    assert {split: len(file.images) for split, file in read_yolo(str(yolo), RunSettings())[1].items()} == {
        "train": 2, "val": 2
    }  # fmt: skip


def test_links_do_not_lead_out_of_the_folder(yolo, voc, tmp_path):
    write(tmp_path / "secret", "root:password\n")
    for file, read in ((yolo / "train/labels/a.txt", read_yolo), (voc / "Annotations/a.xml", read_voc)):
        file.unlink()
        file.symlink_to(tmp_path / "secret")
        with pytest.raises(UserError, match=f"{file.name}', which is a link that leaves") as error:
            read(str(yolo if read is read_yolo else voc), RunSettings())
        assert "password" not in str(error.value)


def test_other_files_beside_the_images_of_voc_are_not_taken_for_them(voc):
    for name in ("a.json", "a.xml", "b.txt"):
        write(voc / "JPEGImages" / name, "{}")
    assert set(said(read_voc(str(voc), RunSettings())[1]["train"])) == {"a.jpg", "b.png", "c.jpg"}


TEXT = {
    "Annotations/a.xml": "<annotation><size><width>100</width><height>50</height></size>"
    + OBJECT.format("cat", 0, 1, 1, 9, 9) + "</annotation>",
    "train/labels/a.txt": "1 0.5 0.5 0.2 0.4\n0 0.1 0.2 0.3 0.2 0.3 0.6\n",
    "data.yaml": "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['dog', 'cat']\ndate: 2024-12-24\n",
}


@pytest.mark.parametrize("file", TEXT)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_read_or_refused_in_one_sentence(voc, yolo, file, data):
    """Places of a good file overwritten by what such files are made of, or by any character."""
    text = list(TEXT[file])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        pieces = st.sampled_from(["", "<", "</", "&#0;", "[", "{", ":", "- ", "nan", "1e999", "-7", "99", "!!x ", "\n"])
        text[at : at + data.draw(st.integers(0, 9))] = data.draw(pieces | st.text(max_size=2))
        text = text or [" "]
    folder = voc if file.endswith(".xml") else yolo
    (folder / file).write_bytes("".join(text).encode("utf-8", "surrogatepass"))
    try:
        _, files = (read_voc if folder is voc else read_yolo)(str(folder), RunSettings())
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 600
    else:
        assert files["train"].images


def test_odd_boxes_and_classes_are_rejected_with_the_reason(yolo):
    lines = ["7 0.5 0.5 0.2 0.4", "0 nan 0.5 0.1 0.1", "0 2 2 0.1 0.1", "1 0.5 0.5 0.2 0.4"]
    write(yolo / "train" / "labels" / "a.txt", "\n".join(lines))
    reasons = [reason for *_, reason in said(read_yolo(str(yolo), RunSettings())[1]["train"])["train/images/a.jpg"]]
    assert reasons == [
        "there is no category 7", "a number of the box or its area is not finite",
        "nothing of the box is inside the image", None,
    ]  # fmt: skip


@pytest.mark.ray
def test_both_become_shards_like_any_other(ray_cluster, voc, yolo, tmp_path):
    (yolo / "train" / "images" / "broken.jpg").write_bytes(b"nothing")
    settings = override_settings(RunSettings(), {"ingest.max_reject_fraction": 0.5, "data.val_fraction": 0.4})
    for folder, train, boxes, lost in ((voc, 2, None, 0), (yolo, 2, 2, 1)):
        out = tmp_path / "out" / folder.name
        out.mkdir(parents=True)
        result = ingest(settings, source(settings, folder), out)
        assert result["images"]["train"] == train and result["images"]["val"] == 1
        assert boxes in (None, result["boxes"]["train"]) and result["rejected_images"] == lost
        assert sum(result["boxes"].values()) == (2 if folder == voc else 3)
        names = {category["name"] for category in read_json(out / "dataset.json")["categories"]}
        assert names == {"cat", "dog"}
        assert len(read_split(out, "train")) == train


def test_exports_of_other_tools_are_read(yolo, tmp_path):
    """Ultralytics' path, absolute and foreign prefixes, whole numbers as 1.0, keypoints, splits that are absent."""
    here = yolo / "train" / "images"
    for text in (
        f"path: ./elsewhere\ntrain: {here}\nnames: [dog, cat]",
        "path: x\ntrain: yolo/train/images\ntest: none\nnames: [dog, cat]",
        "train: [train/images, train/images/sub]\nnames: [dog, cat]",
    ):  # fmt: skip
        write(yolo / "data.yaml", text)
        files = read_yolo(str(yolo), RunSettings())[1]
        assert {split: list(said(file)) for split, file in files.items()} == {
            "train": ["train/images/a.jpg", "train/images/sub/b.jpg"]
        }
    write(yolo / "data.yaml", "train: train/images\nkpt_shape: [2, 3]\nnames: [dog, cat]")
    write(yolo / "train" / "labels" / "a.txt", "1.0 0.5 0.5 0.2 0.4 0.1 0.1 2 0.9 0.9 2\n")
    (objects,) = read_yolo(str(yolo), RunSettings())[1]["train"].annotations(0)
    assert objects["box"] == pytest.approx([40, 15, 60, 35]) and objects["segmentation"] is None

    cvat = tmp_path / "cvat"  # labels beside the images
    for name in ("obj_train_data/a.jpg", "obj_train_data/b.jpg"):
        picture(cvat / name)
    write(cvat / "obj_train_data" / "a.txt", "0 0.5 0.5 1 1\n")
    write(cvat / "obj.names", "dog\n\n")
    assert said(read_yolo(str(cvat), RunSettings())[1]["train"]) == {
        "obj_train_data/a.jpg": [("dog", [0, 0, 100, 50], None)], "obj_train_data/b.jpg": [],
    }  # fmt: skip
    write(cvat / "obj.names", "dog\n\ncat\n")
    with pytest.raises(UserError, match="empty line between classes"):
        read_yolo(str(cvat), RunSettings())


def test_segmentation_is_kept_if_it_is_wanted(yolo):
    for wanted in (True, False):
        settings = override_settings(RunSettings(), {"ingest.segmentation": wanted})
        rows = read_yolo(str(yolo), settings)[1]["train"].annotations(0)
        assert [row["segmentation"] is not None for row in rows] == [False, wanted]


def test_an_image_named_like_its_file_goes_before_the_name_in_it(voc):
    write(voc / "Annotations" / "c.xml", (voc / "Annotations" / "a.xml").read_text())
    picture(voc / "JPEGImages" / "s" / "d.jpg")
    write(voc / "Annotations" / "s" / "d.xml", (voc / "Annotations" / "a.xml").read_text())
    assert list(said(read_voc(str(voc), RunSettings())[1]["train"])) == ["a.jpg", "b.png", "c.jpg", "s/d.jpg"]


def test_which_layout_a_folder_has(voc, yolo, tmp_path):
    def layout(folder, **data):
        return other_layout(str(folder), DataSettings(**data))

    assert layout(voc) is read_voc and layout(yolo) is read_yolo
    assert layout(yolo, train="typo.json") is None and layout(tmp_path) is None
    with pytest.raises(UserError, match=r"data.val=x.json names nothing"):
        layout(yolo, val="x.json")
    write(yolo / "instances_train.json", "{}")
    assert layout(yolo) is None
    (yolo / "instances_train.json").rename(yolo / "labels.json")
    (yolo / "data.yaml").rename(yolo / "classes.txt")
    assert layout(yolo) is None  # a COCO folder whose file has another name
    (voc / "JPEGImages").rename(voc / "images")
    assert read_voc(str(voc), RunSettings())[0] == str(voc / "images")

"""Which images an input means, in what order, and which of them are new."""
from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Picture

from pipelines import listing as listing_module
from pipelines.listing import BATCH, Image, Listing, find_images, list_images
from pipelines.settings import UserError, load_settings

SETTINGS = load_settings()


def picture(path: Path, width: int = 8, height: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.new("RGB", (width, height)).save(path)
    return path


def keys(images) -> list[str]:
    return [image.key for image in images]


# --- kinds of input


def test_a_folder_gives_its_images_at_every_depth_in_order(tmp_path):
    for name in ("b.png", "a/z.JPG", "a/y/x.jpeg"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    images = list_images(tmp_path, SETTINGS)
    assert keys(images) == ["a/y/x.jpeg", "a/z.JPG", "b.png"]
    assert [image.size for image in images] == [Path(image.uri).stat().st_size for image in images]
    assert list_images(f"{tmp_path}/", SETTINGS) == list_images(tmp_path.as_uri(), SETTINGS) == images
    os.utime(tmp_path / "b.png", ns=(1, 1))
    again = list_images(tmp_path, SETTINGS)
    assert again[:2] == images[:2] and again[2].etag != images[2].etag


def test_links_in_a_folder_are_followed_but_not_round_and_round(tmp_path):
    picture(tmp_path / "in" / "day" / "a.png")
    picture(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "day" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert keys(list_images(tmp_path / "in", SETTINGS)) == ["day/a.png", "more/b.png"]


def test_one_image_is_an_input(tmp_path):
    (image,) = list_images(picture(tmp_path / "a.png"), SETTINGS)
    (same,) = list_images(tmp_path, SETTINGS)
    assert image == same and image.key == "a.png"


def test_a_list_names_images_relative_to_its_folder(tmp_path):
    for name in ("a.png", "sub/b.png", "not listed.png"):
        picture(tmp_path / name)
    (tmp_path / "raw.data").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    text = "\ufeffsub/b.png\r\n\n ./a.png \ngone.png\nraw.data\nfolder\n"
    (tmp_path / "list.txt").write_bytes(text.encode())
    images = list_images(tmp_path / "list.txt", SETTINGS)
    assert keys(images) == ["a.png", "folder", "gone.png", "raw.data", "sub/b.png"]
    assert [(image.etag, image.size) for image in images if image.key in ("folder", "gone.png")] == [("", 0)] * 2
    assert [image.size for image in images if image.key == "raw.data"] == [1]


def test_a_coco_file_names_images_in_the_folder_beside_it(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / "images" / name)
    records = [{"id": 17, "file_name": "b.png"}, {"file_name": "a.png"}]
    (tmp_path / "val.json").write_text(json.dumps({"images": records}))
    images = list_images(tmp_path / "val.json", SETTINGS)
    assert [(image.key, image.image_id) for image in images] == [("a.png", None), ("b.png", 17)]
    assert images[1].uri == str(tmp_path / "images" / "b.png") and images[1].size > 0


def table(path: Path, columns: dict[str, list]) -> Path:
    """A .csv or .parquet file."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=2)
        return path
    rows = [columns, *zip(*columns.values(), strict=True)]
    path.write_text("".join(",".join(f'"{value}"' for value in row) + "\r\n" for row in rows), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_of_a_table_names_images(tmp_path, kind):
    for name in ("in/a, b.png", "in/sub/ü.png", "away/c d.png", "away/e.png"):
        picture(tmp_path / name)
    there = [str(tmp_path / "away" / "e.png"), (tmp_path / "away" / "c d.png").as_uri()]
    names = ["sub/ü.png", "./a, b.png", *there, "gone.png"]
    columns = {"id": list(range(5)), "file_name": ["x.png"] * 5, "uri": names, "other": names[::-1]}
    file = table(tmp_path / "in" / f"list.{kind}", columns)
    images = list_images(file, SETTINGS)
    assert keys(images) == sorted(["sub/ü.png", "a, b.png", *there, "gone.png"])
    by_key = {image.key: image for image in images}
    assert by_key[there[1]].uri == str(tmp_path / "away" / "c d.png")
    assert [image.key for image in images if not image.size] == ["gone.png"]
    assert list_images(file, SETTINGS, "other") == images
    with pytest.raises(UserError, match=r"'x\.png' was named before"):
        list_images(file, SETTINGS, "file_name")
    with pytest.raises(UserError, match="no column 'url'; name one of those that are there: id, file_name, uri, other"):
        list_images(file, SETTINGS, "url")


def test_texts_of_every_kind_in_parquet_are_names(tmp_path):
    picture(tmp_path / "a.png")
    for at, names in enumerate((
        pa.array(["a.png"], pa.large_string()),
        pa.array(["a.png"]).dictionary_encode(),
        pa.array(["a.png"], pa.string_view()),
    )):  # fmt: skip
        pq.write_table(pa.table({"path": names}), tmp_path / f"{at}.parquet")
        assert list_images(tmp_path / f"{at}.parquet", SETTINGS) == list_images(tmp_path / "a.png", SETTINGS)


# --- what is refused


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png", "link.png"])
@pytest.mark.parametrize("kind", ["txt", "json", "csv", "parquet"])
def test_a_listed_name_cannot_leave_its_folder(tmp_path, name, kind):
    picture(tmp_path / "secret.png")
    root = tmp_path / "data"
    folder = root / "images" if kind == "json" else root
    picture(folder / "ok.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["ok.png", name]
    path = root / f"list.{kind}"
    if kind in ("csv", "parquet"):
        table(path, {"uri": names})
        if name.startswith("/"):  # a table may hold absolute paths
            assert keys(list_images(path, SETTINGS)) == ["/etc/secret.png", "ok.png"]
            return
    else:
        as_json = json.dumps({"images": [{"file_name": name} for name in names]})
        path.write_text({"txt": "\n".join(names), "json": as_json}[kind])
    with pytest.raises(UserError, match="leaves the images folder") as error:
        list_images(path, SETTINGS)
    assert error.value.exit_code == 2
    where = {"txt": "line 2", "json": "images[1]"}.get(kind, "row 2")
    assert where in str(error.value) and name in str(error.value)


def test_an_input_that_cannot_be_used_is_explained(tmp_path):
    for folder in ("empty", "images", "strange"):
        (tmp_path / folder).mkdir()
    picture(tmp_path / "strange" / "a.png")
    os.rename(tmp_path / "strange" / "a.png", os.fsencode(tmp_path / "strange") + b"/\xff.png")
    files = {"twice.txt": "a.png\nb.png\n./a.png", "blank.txt": "\n", "broken.json": "{", "other.json": "[]"}
    files |= {"nameless.json": '{"images": [{"id": 1}]}', "none.json": '{"images": []}', "data.bin": "x"}
    files |= {"empty.csv": "", "header.csv": "uri\n", "hole.csv": 'uri,n\na.png,1\n"",2\n', "ragged.csv": "uri\na,b\n"}
    files |= {"columns.csv": "url,n\na.png,1\n", "text.parquet": "no Parquet", "nul.csv": "uri\n/a\0.png\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.txt").write_bytes("ä.png".encode("latin-1"))
    (tmp_path / "latin.csv").write_bytes("uri\nä.png\n".encode("latin-1"))
    table(tmp_path / "numbers.parquet", {"uri": [1, 2]})
    for name, words in [
        ("nowhere", "There is no file or folder"),
        ("empty", "There is no image below"),
        ("strange", r"strange/\\xff\.png is a name that is not UTF-8; rename it"),
        ("twice.txt", r"twice.txt, image 3: 'a.png' was named before; name it once"),
        ("blank.txt", "names no image"),
        ("latin.txt", "is not UTF-8"),
        ("broken.json", "is not JSON"),
        ("other.json", "has no list `images`"),
        ("nameless.json", r"images\[0\] has no file_name"),
        ("none.json", "names no image"),
        ("data.bin", "give one of these"),
        ("empty.csv", "cannot be read as CSV"),
        ("header.csv", "names no image"),
        ("hole.csv", "row 2: 'uri' is '', which names no image"),
        ("ragged.csv", "cannot be read as CSV"),
        ("columns.csv", "none of the columns uri, path, .* those that are there: url, n"),
        ("latin.csv", "cannot be read as CSV: .*UTF8"),
        ("nul.csv", "row 1: .* holds a NUL"),
        ("text.parquet", "cannot be read as Parquet"),
        ("numbers.parquet", "row 1: 'uri' is 1, which names no image"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            list_images(tmp_path / name, SETTINGS)
        assert error.value.exit_code == 2 and "\n" not in str(error.value), name
    for name in ("images", "twice.txt"):
        with pytest.raises(UserError, match="has no columns; leave 'uri' out"):
            list_images(tmp_path / name, SETTINGS, "uri")
    (tmp_path / "images").rmdir()
    with pytest.raises(UserError, match="there is no such folder"):
        list_images(tmp_path / "none.json", SETTINGS)


def test_a_long_list_is_not_read_to_its_end_before_its_first_image_comes(tmp_path):
    lines = [f"{n}.png" for n in range(2 * BATCH)] + ["../secret.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    table(tmp_path / "list.csv", {"uri": lines})
    for kind in ("txt", "csv"):
        found = find_images(tmp_path / f"list.{kind}", SETTINGS)
        assert [next(found).key for _ in range(2 * BATCH)] == lines[:-1]
        with pytest.raises(UserError, match="leaves the images folder"):
            next(found)


def long_list(folder: Path) -> Path:
    (folder / "list.txt").write_text("\n".join(f"{n}.png" for n in range(2 * BATCH)))
    return folder / "list.txt"


def test_many_names_are_looked_at_at_a_time_and_none_waits_for_a_slow_one(tmp_path, monkeypatch):
    side_by_side, further = threading.Barrier(64), threading.Event()
    waited = []

    def look(uri, *attempts):
        number = int(Path(uri).stem)
        if 1 <= number <= 64:
            side_by_side.wait(20)
        if number == BATCH - 10:  # the slow one
            waited.append(further.wait(20))
        if number == BATCH + 500:
            further.set()
        return "e", number

    monkeypatch.setattr(listing_module, "_look", look)
    found = list(find_images(long_list(tmp_path), SETTINGS))
    assert [image.size for image in found] == list(range(2 * BATCH)) and waited == [True]


def test_names_that_wait_are_not_looked_at_when_one_ends_the_listing(tmp_path, monkeypatch):
    looked = []

    def look(uri, *attempts):
        looked.append(uri)
        time.sleep(0.02)
        if uri.endswith("/10.png"):
            raise UserError("The credentials are no more.", 2)
        return "e", 1

    monkeypatch.setattr(listing_module, "_look", look)
    with pytest.raises(UserError, match="no more"):
        list(find_images(long_list(tmp_path), SETTINGS))
    assert len(looked) < BATCH // 2


# --- the listing


def image(key: str, etag: str = "1") -> Image:
    return Image(key, f"/data/{key}", etag, len(key))


def test_the_order_is_that_of_the_keys_bytes():
    names = ["a/b", "a-b", "a b", "a", "B", "ä", "\uffff", "\U0001f600", "a\nb", "10", "9", "a" * 900]
    with Listing() as listing:
        assert listing.add(map(image, names), "here") == listing.count() == len(names)
        found = list(listing.images())
    assert [one.key for one, _, _ in found] == sorted(names, key=str.encode)
    assert all(one == image(one.key) and (run, shard) == (None, None) for one, run, shard in found)


def test_only_what_no_earlier_run_knew_is_new():
    with Listing() as listing:
        listing.add([image("same"), image("changed", "2"), image("new"), image("back", "1"), image("gone", "")], "here")
        listing.known([("same", "1", 1, 7), ("changed", "1", 1, 8), ("back", "1", 1, 9), ("no more", "1", 1, 9)])
        listing.known([("back", "2", 2, 0), ("gone", "", 2, 1)])  # a later run: back was changed, and is as it was
        found = list(listing.images())
        assert listing.count() == 3
    assert found == [(image("back"), 2, 0), (image("changed", "2"), 1, 8), (image("new"), None, None)]


def test_new_ones_of_many_are_those_that_a_dictionary_says():
    random = np.random.default_rng(0)
    now = {f"{key:04x}": str(random.integers(3)) for key in random.permutation(5000)[:3000]}
    runs = [
        [(f"{key:04x}", str(random.integers(3)), run, int(key) // 100) for key in random.permutation(5000)[:1500]]
        for run in range(3)
    ]
    known = {key: row for rows in runs for key, *row in rows}
    with Listing() as listing:
        listing.add((image(key, etag) for key, etag in now.items()), "here")
        for rows in runs:
            listing.known(iter(rows))
        found = [(one.key, run, shard) for one, run, shard in listing.images()]
    expected = [(key, *known.get(key, (None, None, None))[1:]) for key in sorted(now)
                if key not in known or known[key][0] != now[key]]  # fmt: skip
    assert found == expected and 1000 < len(found) < 3000


def test_an_error_of_the_source_is_passed_on_and_a_full_disk_is_said():
    def broken():
        yield image("a")
        raise UserError("The bucket went away.")

    with Listing() as listing, pytest.raises(UserError, match="The bucket went away"):
        listing.add(broken(), "here")
    with Listing() as listing:
        listing._database.execute("PRAGMA max_page_count = 20")
        with pytest.raises(UserError, match=r"cannot be kept on disk .*full.*; set TMPDIR") as error:
            listing.add((image(f"{n:099d}") for n in range(2000)), "here")
        assert error.value.exit_code == 1


def test_a_listing_is_on_disk_without_a_name():
    """So that a kill leaves nothing."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc to see open files in")
    with Listing() as listing:
        listing.add((image(f"{n:0999d}") for n in range(20_000)), "here")  # 40 MB
        opened = [path for path in Path("/proc/self/fd").iterdir() if "etilqs_" in os.path.realpath(path)]
        assert sum(path.stat().st_size for path in opened) > 2**24
        assert all(os.path.realpath(path).endswith("(deleted)") for path in opened)

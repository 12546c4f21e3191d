"""Folders of Pascal VOC's XML and of YOLO's text files, read as the COCO files that say the same."""
from __future__ import annotations

import hashlib
import math
import posixpath
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml
from PIL import Image
from pyarrow.fs import FileType

from pipelines.coco import IMAGE_EXTENSIONS, CocoFile, coco_from, image_place
from pipelines.progress import console, track
from pipelines.settings import DataSettings, RunSettings, UserError
from pipelines.storage import is_denied, is_remote, join, kind, list_files, locate, not_done, read_file

READERS = 16  # files read at a time
SPLITS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}  # what the splits are called
YOLO_NAMES = ("data.yaml", "data.yml", "classes.txt", "obj.names")


def other_layout(path: str, data: DataSettings) -> Callable[[str, RunSettings], tuple[str, dict[str, CocoFile]]] | None:
    """Who reads a folder that is not COCO's: `read_voc`, `read_yolo`, or None.

    A folder with a COCO file, or settings that name one, is COCO's. Raises UserError (exit code 2) where other settings
    name files that such a folder does not have.
    """
    default = {split: DataSettings.model_fields[split].default for split in SPLITS}
    there = list_files(path)
    if data.train != default["train"] or data.train in there:
        return None
    read = None
    if kind(join(path, "Annotations")) == FileType.Directory:
        read = read_voc
    else:
        names = set(YOLO_NAMES) & there.keys()
        if any(name.endswith(".json") for name in there):
            names -= {"classes.txt", "obj.names"}  # which may lie beside a COCO file of another name
        if names:
            read = read_yolo
    told = [f"data.{split}={getattr(data, split)}" for split in SPLITS if getattr(data, split) != default[split]]
    if read and told:
        raise UserError(f"{path} has no COCO files, but a layout of its own, so that {told[0]} names nothing.", 2)
    return read


def read_voc(path: str, settings: RunSettings) -> tuple[str, dict[str, CocoFile]]:
    """A Pascal VOC folder (Everingham et al. 2010) -> (folder of its images, its splits).

    Annotations/NAME.xml, the images in JPEGImages (or data.images), and, where there are splits,
    ImageSets/Main/train.txt, val.txt and test.txt; without them all are train. VOC counts pixels from 1 and takes both
    corners as inside: xmin 1 and xmax 10 are the box from 0 to 10. Objects marked as difficult become crowds: not
    trained on, neither missed nor wrong in the evaluation, as VOC counts them. Raises UserError (exit code 2) naming
    the file that is wrong.
    """
    root = join(path, "JPEGImages")
    if kind(root) != FileType.Directory:
        root = join(path, settings.data.images)
    if kind(root) != FileType.Directory:
        raise UserError(f"There is no images folder JPEGImages in {path}; set data.images to its name.", 2)
    folder = join(path, "Annotations")
    stems = sorted(name[:-4] for name in list_files(folder, recursive=True) if name.endswith(".xml"))
    pictures = [name for name in list_files(root, recursive=True) if name.lower().endswith(IMAGE_EXTENSIONS)]
    by_stem = {posixpath.splitext(name)[0]: name for name in sorted(pictures)}
    place = join(path, "ImageSets/Main")
    sets = _image_sets(place, set(stems)) or {"train": stems}

    def read(stem: str) -> tuple[bytes, dict[str, Any], list[dict[str, Any]]]:
        file = _inside(folder, f"{stem}.xml")
        data = _bytes(file)
        image, objects = _voc_image(file, data)
        # The file's own name first: copies keep the name that their first had.
        image["file_name"] = by_stem.get(stem, image["file_name"])
        return data, image, objects

    found = {split: list(_read_all(read, names, f"Reading {split}")) for split, names in sets.items()}
    classes = sorted({one["name"] for rows in found.values() for _, _, objects in rows for one in objects})
    ids = {name: number for number, name in enumerate(classes, 1)}
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    files = {}
    for split, rows in found.items():
        for _, _, objects in rows:
            for one in objects:
                one["category_id"] = ids[one.pop("name")]
        files[split] = _file(f"{folder} ({split})", b"", rows, root, categories, settings)
    return root, files


def read_yolo(path: str, settings: RunSettings) -> tuple[str, dict[str, CocoFile]]:
    """A YOLO folder -> (folder of its images, which is itself, and its splits).

    data.yaml names the classes, and where the images of train, val and test are: folders, or lists of files; without
    one, classes.txt or obj.names does, and all images are train. The labels of .../images/NAME.jpg are in
    .../labels/NAME.txt, those of an image elsewhere beside it, a line for each object: the class's number, then x and y
    of the centre, width and height as shares of the image's, or the corners of a polygon. An image without such a file,
    or with an empty one, has no objects. Raises UserError (exit code 2) naming the file and line that is wrong.
    """
    file = next(name for name in map(lambda name: join(path, name), YOLO_NAMES) if kind(name) == FileType.File)
    everything = list_files(path, recursive=True)
    names, places, keypoints = _yolo_file(file)
    categories = [{"id": number, "name": name} for number, name in sorted(names.items())]
    files: dict[str, CocoFile] = {}
    taken: dict[str, tuple[str, Any]] = {}  # by image, the split and its place
    for split, place in places.items():
        images = sorted(set(_yolo_images(path, file, place, everything)))
        if not any(name in everything for name in images):
            if split != "train":  # exports name splits that were left empty
                console.print(f"{file} says that {split} is in {place!r}, where there is no image; it is left out.")
                continue
            raise UserError(f"{file} says that {split} is in {place!r}, but there is no image.", 2)

        for name in images:  # the same place told twice is meant so
            other, there = taken.setdefault(name, (split, place))
            if there != place:
                raise UserError(
                    f"{file} says that {other} is in {there!r} and {split} in {place!r}, but both are found to have "
                    f"{name}; mend the places, which are relative to {path}.",
                    2,
                )

        def read(name: str) -> tuple[bytes, dict[str, Any], list[dict[str, Any]]]:
            width, height = _size(_inside(path, name)) if name in everything else (1, 1)  # ingest says why
            label = _inside(path, _label_file(name))
            data = _bytes(label) if _label_file(name) in everything else b""
            objects = list(_yolo_objects(label, data, width, height, keypoints))
            return name.encode() + b"\0" + data, {"file_name": name, "width": width, "height": height}, objects

        rows = list(_read_all(read, images, f"Reading {split}"))
        files[split] = _file(f"{file} ({split})", _bytes(file), rows, path, categories, settings)
    return path, files


def _file(
    path: str, head: bytes, rows: list[tuple[bytes, dict, list[dict]]], root: str, categories: list[dict],
    settings: RunSettings,
) -> CocoFile:  # fmt: skip
    """Rows of (what its file says, image, its objects), numbered from 1 on."""
    total = hashlib.sha256(head)
    images, annotations = [], []
    for number, (said, image, objects) in enumerate(rows, 1):
        total.update(hashlib.sha256(said).digest())
        images.append({"id": number, **image})
        annotations += [{"id": len(annotations) + n, "image_id": number, **one} for n, one in enumerate(objects, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return coco_from(path, total.hexdigest(), content, root, settings.ingest)


def _read_all(read: Callable[[str], Any], names: Iterable[str], what: str) -> Iterator[Any]:
    names = list(names)
    pool = ThreadPoolExecutor(READERS)
    try:
        yield from track(pool.map(read, names), what, len(names))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error the rest is not read first


def _inside(folder: str, name: str) -> str:
    """Where a file of a folder is; UserError (exit code 1) where a link leads out of it."""
    try:
        return image_place(folder, name)
    except ValueError as error:
        raise UserError(f"{folder} has a file {name!r}, which {error}; nothing of it was read.", 2) from error


def _in_a_line(error: Exception) -> str:
    """What a parser says, short and printable."""
    text = " ".join(str(error).split())[:200]
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _bytes(file: str) -> bytes:
    data, reason = read_file(file)
    if reason is not None:
        raise UserError(f"{file} is needed, but {reason}.", 2)
    return data


def _text(file: str) -> str:
    try:
        return _bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text file (it is not UTF-8).", 2) from error


def _image_sets(folder: str, stems: set[str]) -> dict[str, list[str]]:
    """The names in train.txt, val.txt and test.txt, of those that are there."""
    if kind(folder) != FileType.Directory:
        return {}
    there = list_files(folder)
    found: dict[str, list[str]] = {}
    for split, words in SPLITS.items():
        for word in words:
            if f"{word}.txt" in there:
                file = join(folder, f"{word}.txt")
                lines = [line.strip() for line in _text(file).splitlines() if line.strip()]
                # Either the name alone, which may have spaces, or the name and 1 or -1.
                found[split] = [line if line in stems else line.rsplit(maxsplit=1)[0] for line in lines]
                if missing := set(found[split]) - stems:
                    raise UserError(f"{file} names {min(missing)!r}, but there is no such .xml in Annotations.", 2)
    if found and "train" not in found:
        raise UserError(f"{folder} has {' and '.join(found)}, but no train.txt.", 2)
    return found


def _voc_image(file: str, data: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An annotation file of VOC -> (COCO's image without id, its annotations with `name` for their class)."""
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{file} is not XML: {_in_a_line(error)}.", 2) from error

    def number(element: ElementTree.Element, key: str, where: str) -> float:
        text = element.findtext(key)
        try:
            return float(text)
        except (TypeError, ValueError) as error:
            found = "is missing" if text is None else f"is {text.strip()[:40]!r}"
            raise UserError(f"{file}: {where}/{key} {found}; it must be a number.", 2) from error

    size = root.find("size")
    if size is None:
        raise UserError(f"{file} has no size; it must say the image's width and height.", 2)
    name = (root.findtext("filename") or "").strip()
    image = {"file_name": posixpath.basename(name.replace("\\", "/")) or f"{Path(file).stem}.jpg"}
    image |= {key: number(size, key, "size") for key in ("width", "height")}
    if not all(image[key] >= 1 and image[key].is_integer() for key in ("width", "height")):
        raise UserError(f"{file} says that the image is {image['width']:g}x{image['height']:g}; mend its size.", 2)
    objects = []
    for at, element in enumerate(root.iterfind("object")):
        where = f"object[{at}]"
        box = element.find("bndbox")
        name = (element.findtext("name") or "").strip()
        if box is None or not name:
            raise UserError(f"{file}: {where} has no {'bndbox' if box is None else 'name'}.", 2)
        left, top, right, bottom = (number(box, key, f"{where}/bndbox") for key in ("xmin", "ymin", "xmax", "ymax"))
        more = {key: text for key in ("pose", "truncated", "occluded", "difficult") if (text := element.findtext(key))}
        difficult = more.get("difficult", "0").strip() == "1"
        bbox = [left - 1, top - 1, right - left + 1, bottom - top + 1]
        objects.append({"name": name, "bbox": bbox, "iscrowd": int(difficult), **more})
    return image, objects


def _yolo_file(file: str) -> tuple[dict[int, str], dict[str, Any], bool]:
    """({number: class}, {split: where its images are}, whether keypoints follow the boxes) of a data.yaml or a list of
    classes."""
    if not file.endswith((".yaml", ".yml")):
        lines = _text(file).rstrip().splitlines()
        if not all(line.strip() for line in lines):
            raise UserError(f"{file} has an empty line between classes, which are counted by line; take it out.", 2)
        return {number: line.strip() for number, line in enumerate(lines)}, {"train": "."}, False
    try:
        content = yaml.safe_load(_text(file))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates that there are not, lists too deep
        raise UserError(f"{file} is not YAML: {_in_a_line(error)}.", 2) from error
    content = content if isinstance(content, dict) else {}
    names = content.get("names")
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not names or not all(isinstance(number, int) for number in names):
        raise UserError(f"{file} has no names; write the classes as a list, `names: [cat, dog]`.", 2)
    places = {}
    for split, words in SPLITS.items():
        for word in words:
            if content.get(word):
                places[split] = content[word]
    if "train" not in places:
        raise UserError(f"{file} does not say where train is; write `train: images/train`.", 2)
    return {number: str(name) for number, name in names.items()}, places, "kpt_shape" in content


def _yolo_images(path: str, file: str, place: Any, everything: dict[str, Any]) -> Iterator[str]:
    """The images of a folder, of a list of files, or of several of these, by their names relative to path."""
    folders = {posixpath.dirname(name) for name in everything}

    def inside(name: str) -> str:
        """The name relative to path. Those written for another place (../train/images beside the file, data/train.txt,
        an absolute path) are taken by the longest end that is there; nothing outside of path is ever read."""
        parts = [part for part in name.strip().replace("\\", "/").split("/") if part not in ("", ".", "..")]
        for start in range(len(parts)):
            end = "/".join(parts[start:])
            if end in everything or any(folder == end or folder.startswith(f"{end}/") for folder in folders):
                return end
        return "/".join(parts)

    for one in place if isinstance(place, list) else [place]:
        name = inside(str(one))
        if name in everything and name.endswith(".txt"):
            yield from (inside(line) for line in _text(_inside(path, name)).splitlines() if line.strip())
        else:
            start = f"{name}/" if name else ""
            yield from (n for n in everything if n.startswith(start) and n.lower().endswith(IMAGE_EXTENSIONS))


def _label_file(name: str) -> str:
    """.../images/.../NAME.jpg -> .../labels/.../NAME.txt"""
    parts = posixpath.splitext(name)[0].split("/")
    for at in range(len(parts) - 2, -1, -1):
        if parts[at] == "images":
            parts[at] = "labels"
            break
    return "/".join(parts) + ".txt"


def _yolo_objects(file: str, data: bytes, width: int, height: int, keypoints: bool) -> Iterator[dict[str, Any]]:
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text file (it is not UTF-8).", 2) from error
    for at, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        try:
            number, *values = (float(word) for word in words)
        except ValueError as error:
            raise UserError(f"{file}, line {at}: {line[:60]!r} holds what is no number.", 2) from error
        if not number.is_integer():
            raise UserError(f"{file}, line {at}: the class is {words[0]!r}; it must be a whole number.", 2)
        one: dict[str, Any] = {"category_id": int(number)}
        if len(values) == 4 or (keypoints and len(values) > 4):
            x, y, w, h = values[:4]
            one["bbox"] = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        elif len(values) >= 6 and len(values) % 2 == 0 and all(map(math.isfinite, values)):
            xs, ys = [v * width for v in values[::2]], [v * height for v in values[1::2]]
            one["bbox"] = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            one["segmentation"] = [[value for corner in zip(xs, ys, strict=True) for value in corner]]
        else:
            raise UserError(
                f"{file}, line {at}: a class and {len(values)} numbers; it must be a class, then x, y, width and "
                "height, or the corners of a polygon.",
                2,
            )
        yield one


def _size(file: str) -> tuple[int, int]:
    """Width and height as the header says; 1 by 1 where it does not, since such an image is rejected anyway."""
    from detr.transforms import picture_formats

    try:
        fs, path = locate(file)
        with fs.open_input_file(path) as stream:
            try:
                size = Image.open(stream, formats=picture_formats()).size
            except Exception:  # noqa: BLE001 - a damaged header raises anything; ingest says what is wrong
                return 1, 1
    except OSError as error:
        if is_remote(file) and not isinstance(error, FileNotFoundError) and not is_denied(error):
            raise not_done(file, "read", error) from error
        return 1, 1
    return size if min(size) > 0 else (1, 1)

"""What it costs to make shards of a COCO folder: images per second, and memory, as the folder grows.

\b
    python benchmarks/ingest.py --images 1000 --images 5000 --images 20000
    python benchmarks/ingest.py --data path/to/coco --images 20000
    python benchmarks/ingest.py --annotations 118000

The images are those of --data (train; 640x480 photographs by default), copied under new names and ids as often as need
be. Beside the whole ingest stands what the machine does at the least: reading the files, and decoding them, in as many
processes as there are cores. Before each of these the files are dropped from the system's cache, as far as it does so
when asked. --annotations reads an annotation file alone, as large as COCO's own would be with
that many images: seven boxes with polygons of 30 corners in each.
"""
from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from common import machine, print_table, run_side, write_result
from feed import write_photographs

from detr.transforms import decode_image
from pipelines.coco import read_coco
from pipelines.settings import RunSettings

BOXES, CORNERS = 7, 30  # of an image in a made annotation file


def repeat(data: Path, folder: Path, images: int) -> None:
    """A COCO folder of so many images: those of `data`, again and again, copied under new names."""
    content = json.loads((data / "instances_train.json").read_text())
    (folder / "images").mkdir(parents=True)
    by_image: dict[int, list] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    records, annotations = [], []
    for n in range(images):
        image = content["images"][n % len(content["images"])]
        name = f"{n:08d}{Path(image['file_name']).suffix}"
        shutil.copyfile(data / "images" / image["file_name"], folder / "images" / name)
        records.append({**image, "id": n, "file_name": name})
        annotations += [{**a, "id": len(annotations) + k, "image_id": n} for k, a in enumerate(by_image[image["id"]])]
    train = {**content, "images": records, "annotations": annotations}
    (folder / "instances_train.json").write_text(json.dumps(train))
    val = {**content, "images": records[:1], "annotations": []}
    (folder / "instances_val.json").write_text(json.dumps(val))


def write_annotations(path: Path, images: int) -> None:
    """An annotation file like COCO's own."""
    rng = np.random.default_rng(0)
    categories = [{"id": n, "name": str(n), "supercategory": "thing"} for n in range(1, 81)]
    with path.open("w") as file:
        file.write('{"info": {"year": 2026}, "images": [')
        for n in range(images):
            record = {"license": 1, "file_name": f"{n:012d}.jpg", "coco_url": f"http://images.example.org/{n:012d}.jpg",
                      "height": 480, "width": 640, "date_captured": "2013-11-14 17:02:52", "id": n}  # fmt: skip
            file.write(f"{', ' if n else ''}{json.dumps(record)}")
        file.write('], "annotations": [')
        for n in range(images * BOXES):
            corners = rng.uniform(0, 480, 2 * CORNERS).round(2).tolist()
            record = {"segmentation": [corners], "area": 702.1, "iscrowd": 0, "image_id": n // BOXES,
                      "bbox": rng.uniform(1, 200, 4).round(2).tolist(), "category_id": n % 80 + 1, "id": n}  # fmt: skip
            file.write(f"{', ' if n else ''}{json.dumps(record)}")
        file.write(f'], "categories": {json.dumps(categories)}}}')


def read(path: Path) -> int:
    return len(path.read_bytes())


def decode(path: Path) -> int:
    return decode_image(path.read_bytes(), 10**8).width


def drop_from_cache(paths: list[Path]) -> None:
    os.sync()  # what is not written yet is not dropped
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_processes(work, paths: list[Path]) -> float:
    """Seconds to do it for all, in as many processes as there are cores."""
    with ProcessPoolExecutor() as pool:
        list(pool.map(abs, range(100)))  # they have started
        began = time.perf_counter()
        list(pool.map(work, paths, chunksize=64))
        return time.perf_counter() - began


class Watch(threading.Thread):
    """The most memory that the largest of Ray's worker processes ever held for itself."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.name().startswith("ray::"):
                        self.most = max(self.most, process.memory_full_info().uss)
                except psutil.Error:
                    continue


def measure(data: Path, folder: Path) -> dict[str, Any]:
    """The ingest of a COCO folder in this process."""
    from jobs.common import ray_session
    from pipelines.ingest import ingest, source

    settings, watch = RunSettings(), Watch()
    with ray_session(settings), redirect_stdout(sys.stderr):
        out = folder / "dataset"
        out.mkdir()
        watch.start()
        began = time.perf_counter()
        result = ingest(settings, source(settings, data), out)
        seconds = time.perf_counter() - began
        watch.over.set()
    images = sum(result["images"].values())
    return {"seconds": seconds, "images": images, "own_MiB": _peak(), "worker_MiB": watch.most / 2**20}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@click.command(help=__doc__)
@click.option("--data", type=Path, help="A COCO folder; 640x480 photographs by default.")
@click.option("--images", "sizes", type=click.IntRange(1), multiple=True, default=[1000, 5000, 20000],
              show_default=True)  # fmt: skip
@click.option("--annotations", type=click.IntRange(1), help="Only read an annotation file, of so many images.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
@click.option("--side", hidden=True)
@click.option("--folder", type=Path, hidden=True)
@click.option("--files", type=Path, hidden=True)
def main(data, sizes, annotations, as_json, side, folder, files):
    if side == "annotations":
        before, began = _peak(), time.perf_counter()
        file = read_coco(files, files.parent)
        seconds = time.perf_counter() - began
        write_result(folder, {"seconds": seconds, "before_MiB": before, "peak_MiB": _peak(), "boxes": file.boxes}, None)
        return
    if side:
        write_result(folder, measure(files, folder), None)
        return
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if annotations:
            path = place / "instances.json"
            write_annotations(path, annotations)
            found = run_side("annotations", place / "run", False, ["--files", str(path)])
            found["file_MiB"] = path.stat().st_size / 2**20
            said = "{boxes:,} boxes in {file_MiB:.0f} MiB read and checked in {seconds:.0f} s; {peak_MiB:.0f} MiB"
            click.echo(json.dumps(found) if as_json else f"{said}, {{before_MiB:.0f}} of them before".format(**found))
            return
        if data is None:
            data = place / "photographs"
            write_photographs(data, 256)
        found = []
        for images in sizes:
            folder = place / str(images)
            repeat(data, folder, images)
            paths = sorted((folder / "images").iterdir())
            drop_from_cache(paths)
            row = {"read": images / in_processes(read, paths)}
            drop_from_cache(paths)
            row["decoded"] = images / in_processes(decode, paths)
            drop_from_cache(paths)
            found.append(row | run_side("ingest", place / "run" / str(images), False, ["--files", str(folder)]))
            shutil.rmtree(folder)
            shutil.rmtree(place / "run" / str(images))
    if as_json:
        click.echo(json.dumps({"machine": machine("cpu"), "runs": found}))
        return
    rows = [
        [f"{r['images']:,}", f"{r['seconds']:.1f}", f"{r['images'] / r['seconds']:.0f}", f"{r['read']:.0f}",
         f"{r['decoded']:.0f}", f"{r['own_MiB']:.0f}", f"{r['worker_MiB']:.0f}"]
        for r in found
    ]  # fmt: skip
    columns = ["images", "s", "images/s", "only read", "read and decoded", "MiB, driver", "MiB, largest worker"]
    notes = ["Read and decoded: images per second in one process per core, nothing else done with them."]
    print_table(f"COCO folder to shards ({machine('cpu')})", columns, rows, notes)


if __name__ == "__main__":
    main()

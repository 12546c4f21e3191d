"""Which images an input means: folders, bucket prefixes, lists, COCO files and tables, in memory that does not grow.

`find_images` streams them in any order, and `Listing` puts them in order of key on disk, so that tens of millions are
no matter.
"""
from __future__ import annotations

import io
import json
import os
import posixpath
import sqlite3
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError, ClientError
from pyarrow import csv
from pyarrow.fs import FileType

from pipelines.coco import IMAGE_EXTENSIONS, image_place
from pipelines.json_stream import JsonObject, NotAnObject
from pipelines.progress import progress
from pipelines.settings import RunSettings, UserError
from pipelines.storage import (
    ASKING,
    WORKING,
    bucket_and_key,
    etag_of,
    files_below,
    filesystem,
    is_remote,
    is_transient,
    join,
    kind,
    list_page,
    not_done,
    patiently,
    plain,
    reason_of,
    s3_client,
)

LISTERS, LOOKERS = 8, 64  # threads: prefixes listed side by side, and listed names looked at
BATCH = 1024  # names that wait to be looked at; images between two words on progress
CACHE = 8 * 1024  # KiB of the listing in memory
TABLES = (".csv", ".parquet")
COLUMNS = ("uri", "path", "image", "file_name", "image_key")  # the first of these that is there names the images


class Image(NamedTuple):
    """One image of an input.

    key: its name relative to the folder, or the URI or absolute path by which it was listed. etag: another when the
    file is. A listed name without a file has etag "" and size 0. image_id: its id in the COCO file that listed it.
    """

    key: str
    uri: str
    etag: str
    size: int  # bytes
    image_id: int | None = None


Name = tuple[str, str, int | None]  # where in its list, the name itself, its id in a COCO file


def find_images(input: str | Path, settings: RunSettings, column: str | None = None) -> Iterator[Image]:
    """The images of an input, one after another in any order; a name that is listed twice comes twice.

    input: a local folder or s3:// prefix (everything below it with an image's extension), one image, a text file
    with a name per line, a COCO file (names relative to `data.images` beside it), or a .csv or .parquet file with a
    column of names; all of them local or on S3. column: that column, by default the first of COLUMNS. Names are
    relative to their list's folder, which they may not leave; lines of a text file may be s3:// URIs, too, and values
    of a column s3:// and file:// URIs and absolute paths. Raises UserError (exit code 2) where there is no image, the
    input cannot be read, or is none of these.
    """
    _, path = filesystem(input)
    place = f"s3://{path}" if is_remote(input) else path
    folder, extension = posixpath.dirname(place), posixpath.splitext(path)[1].lower()
    is_folder = kind(place) == FileType.Directory
    if column is not None and (is_folder or extension not in TABLES):
        raise UserError(f"{input} has no columns; leave {column!r} out, or name a .csv or .parquet file.", 2)
    if is_folder:
        return _below(place)
    if extension in IMAGE_EXTENSIONS:
        return iter([Image(posixpath.basename(path), place, *_look(place))])
    if extension == ".json":
        return _listed(place, join(folder, settings.data.images), coco_names(place), ())
    if extension in (".txt", ".lst"):
        return _listed(place, folder, _lines(place), ("s3://",))
    if extension in TABLES:
        return _listed(place, folder, _column(place, column), ("s3://", "file://", "/"))
    raise UserError(
        f"{input} is no folder, image, list of names (.txt), COCO file (.json) or table with a column of names "
        "(.csv, .parquet); give one of these.",
        2,
    )


def list_images(input: str | Path, settings: RunSettings, column: str | None = None) -> list[Image]:
    """As `find_images`, in order of key, each once: for as many as memory holds."""
    with Listing() as listing:
        listing.add(find_images(input, settings, column), input)
        return [image for image, *_ in listing.images()]


class Listing:
    """Images in order of key, and which of them an earlier run knew, in a SQLite database that dies with the process.

    SQLite puts it where SQLITE_TMPDIR or TMPDIR says: about 300 bytes per image.
    """

    def __enter__(self) -> Listing:
        self._database = sqlite3.connect("")  # a file without a name, by SQLite's rules
        self._database.executescript(f"""
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{CACHE};
            CREATE TABLE images (key TEXT PRIMARY KEY, uri TEXT, etag TEXT, size INTEGER, image_id INTEGER)
                WITHOUT ROWID;
            CREATE TABLE known (key TEXT PRIMARY KEY, etag TEXT, run INTEGER, shard INTEGER) WITHOUT ROWID;
        """)
        return self

    def __exit__(self, *error) -> None:
        self._database.close()

    def add(self, images: Iterable[Image], source: str | Path) -> int:
        """Take in the images of `source`, and say how many they were.

        Raises UserError (exit code 2) where a key comes twice.
        """
        last: Image | None = None
        count = 0

        def counted() -> Iterator[Image]:
            nonlocal last, count
            for last in images:
                count += 1
                if count % BATCH == 0:
                    bar.update(task, completed=count)
                yield last

        with progress(transient=True) as bar:  # an error is a sentence by itself
            task = bar.add_task("images listed", total=None, note="")
            try:
                self._fill("INSERT INTO images VALUES (?, ?, ?, ?, ?)", counted())
            except sqlite3.IntegrityError as error:
                raise UserError(f"{source}, image {count}: {last.key!r} was named before; name it once.", 2) from error
            bar.update(task, completed=count, total=count)
        return count

    def known(self, rows: Iterable[tuple[str, str, int, int]]) -> None:
        """Take in what earlier runs found: (key, etag, run, shard), of which later rows replace earlier ones."""
        self._fill("INSERT OR REPLACE INTO known VALUES (?, ?, ?, ?)", rows)

    def images(self) -> Iterator[tuple[Image, int | None, int | None]]:
        """(image, run, shard) in order of key's bytes, of the images that are not known with the etag they have.

        run and shard are those of the row that knows the key with another etag, None where no row does.
        """
        names = "key, uri, images.etag, size, image_id, run, shard"
        for *image, run, shard in self._database.execute(f"SELECT {names} {self._NEW} ORDER BY key"):
            yield Image(*image), run, shard

    def count(self) -> int:
        """How many `images` gives."""
        return self._database.execute(f"SELECT count(*) {self._NEW}").fetchone()[0]

    _NEW = "FROM images LEFT JOIN known USING (key) WHERE known.etag IS NOT images.etag"

    def _fill(self, statement: str, rows: Iterable[tuple]) -> None:
        try:
            with self._database:
                self._database.executemany(statement, rows)
        except sqlite3.OperationalError as error:
            raise UserError(f"The listing cannot be kept on disk ({error}); set TMPDIR to one with room.") from error


def _below(folder: str) -> Iterator[Image]:
    """The images below a local folder or s3:// prefix."""
    image = None
    for image in _below_prefix(folder) if is_remote(folder) else _below_folder(folder):
        yield image
    if image is None:
        raise UserError(f"There is no image below {folder} (looked for {', '.join(IMAGE_EXTENSIONS)}).", 2)


def _below_folder(folder: str) -> Iterator[Image]:
    try:
        for path in files_below(folder):
            if not path.lower().endswith(IMAGE_EXTENSIONS):
                continue
            path.encode()
            try:
                info = os.stat(path)
            except FileNotFoundError:
                continue  # it went meanwhile
            if stat.S_ISREG(info.st_mode):
                yield Image(path.removeprefix(folder).lstrip("/"), path, etag_of(info), info.st_size)
    except OSError as error:
        raise not_done(folder, "listed", error) from error
    except UnicodeEncodeError as error:
        name = os.fsencode(error.object).decode("utf-8", "backslashreplace")
        raise UserError(f"{name} is a name that is not UTF-8; rename it.", 2) from error


def _below_prefix(folder: str) -> Iterator[Image]:
    bucket, prefix = bucket_and_key(folder)
    prefix = f"{prefix}/" if prefix else ""
    try:
        for entry in _objects(bucket, prefix):
            key = entry["Key"]
            if key.lower().endswith(IMAGE_EXTENSIONS):
                etag = entry["ETag"].strip('"')
                yield Image(key.removeprefix(prefix), f"s3://{bucket}/{key}", etag, entry["Size"])
    except (BotoCoreError, ClientError) as error:
        raise not_done(folder, "listed", error) from error


def _objects(bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """All objects below a prefix; what lies in its folders, where they are not too many, is listed side by side."""
    page = list_page(bucket, prefix, delimiter="/", attempts=ASKING)
    if page["IsTruncated"]:
        below = [prefix]
    else:
        yield from page.get("Contents", ())
        below = [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
    waiting = iter(below)
    with ThreadPoolExecutor(LISTERS) as pool:
        running = {pool.submit(list_page, bucket, one): one for one in islice(waiting, LISTERS)}
        while running:
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                one, page = running.pop(done), done.result()
                if page["IsTruncated"]:
                    running[pool.submit(list_page, bucket, one, page["NextContinuationToken"])] = one
                elif (one := next(waiting, None)) is not None:
                    running[pool.submit(list_page, bucket, one)] = one
                yield from page.get("Contents", ())


def _listed(path: str, root: str, names: Iterator[Name], absolute: tuple[str, ...]) -> Iterator[Image]:
    """The images named in the list `path`, relative to root unless they begin as one of `absolute`."""
    if kind(root) != FileType.Directory:
        raise UserError(f"{path} names images in {root}, but there is no such folder.", 2)

    def image(named: Name, attempts: int = WORKING) -> Image:
        where, name, image_id = named
        try:
            if name.startswith(absolute) and "\0" not in name:
                key, uri = name, plain(name)
            else:
                key, uri = posixpath.normpath(name), image_place(root, name)
        except ValueError as error:
            raise UserError(f"{path}, {where}: {name!r} {error}.", 2) from error
        return Image(key, uri, *_look(uri, attempts), image_id)

    first = next(names, None)
    if first is None:
        raise UserError(f"{path} names no image.", 2)
    yield image(first, ASKING)
    pool = ThreadPoolExecutor(LOOKERS)
    try:
        ahead = deque(pool.submit(image, named) for named in islice(names, BATCH))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(image, named) for named in islice(names, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _look(uri: str, attempts: int = ASKING) -> tuple[str, int]:
    """(etag, size) of a file; ("", 0) of one that is not there or not for us, which is said when it is to be read.

    Raises UserError where others would fare alike, as `reason_of`. attempts: how often S3 is tried.
    """
    bucket, key = bucket_and_key(uri)
    if bucket is None:
        try:
            info = os.stat(key)
        except (OSError, ValueError):
            return "", 0
        return (etag_of(info), info.st_size) if stat.S_ISREG(info.st_mode) else ("", 0)
    client, address = s3_client(1), {"Bucket": bucket, "Key": key}
    try:
        try:
            found = patiently(lambda: client.head_object(**address), attempts)
        except ClientError as error:
            if is_transient(error):
                raise
            found = patiently(lambda: client.get_object(**address), attempts)  # HEAD does not say what is amiss
            found["Body"].close()
    except (BotoCoreError, ClientError) as error:
        reason_of(uri, error)
        return "", 0
    return found["ETag"].strip('"'), found["ContentLength"]


def _lines(path: str) -> Iterator[Name]:
    """Every line that is not empty."""
    fs, place = filesystem(path)
    try:
        with fs.open_input_stream(place) as file:
            for number, line in enumerate(io.TextIOWrapper(file, "utf-8-sig"), 1):
                if line := line.strip():
                    yield f"line {number}", line, None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file with a name per line (it is not UTF-8).", 2) from error
    except OSError as error:
        raise not_done(path, "read", error) from error


def coco_names(path: str) -> Iterator[Name]:
    """(where, file_name, id or None) of every image of a COCO file; annotations need not be there."""
    fs, place = filesystem(path)
    found = False
    try:
        with fs.open_input_stream(place) as file:
            for member, records in JsonObject(file).members():
                if member != "images" or not isinstance(records, Iterator):
                    continue
                found = True
                for number, record in enumerate(records):
                    name = record.get("file_name") if isinstance(record, dict) else None
                    if not isinstance(name, str):
                        raise UserError(f"{path}: images[{number}] has no file_name.", 2)
                    image_id = record.get("id")
                    yield f"images[{number}]", name, image_id if type(image_id) is int else None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.", 2) from error
    except NotAnObject:
        found = False
    except OSError as error:
        raise not_done(path, "read", error) from error
    if not found:
        raise UserError(f"{path} is not a COCO file: it has no list `images`.", 2)


def _column(path: str, column: str | None) -> Iterator[Name]:
    """The values of a column of a .csv or .parquet file."""
    fs, place = filesystem(path)
    number = 0
    try:
        with fs.open_input_file(place) as file:
            if path.lower().endswith(".parquet"):
                table = pq.ParquetFile(file)
                column = _which(path, table.schema_arrow.names, column)
                batches = table.iter_batches(columns=[column])
            else:
                column = _which(path, csv.open_csv(file).schema.names, column)
                file.seek(0)
                options = csv.ConvertOptions(include_columns=[column], column_types={column: pa.string()})
                batches = csv.open_csv(file, convert_options=options)
            for batch in batches:
                for name in batch.column(0).to_pylist():
                    number += 1
                    if not name or not isinstance(name, str):
                        raise UserError(f"{path}, row {number}: {column!r} is {name!r}, which names no image.", 2)
                    yield f"row {number}", name, None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; save it so.", 2) from error
    except pa.ArrowException as error:
        what = "Parquet" if path.lower().endswith(".parquet") else "CSV"
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{path} cannot be read as {what}: {reason}.", 2) from error
    except OSError as error:
        raise not_done(path, "read", error) from error


def _which(path: str, names: list[str], column: str | None) -> str:
    found = [name for name in ([column] if column else COLUMNS) if name in names]
    if not found:
        wanted = f"no column {column!r}" if column else f"none of the columns {', '.join(COLUMNS)}"
        raise UserError(f"{path} has {wanted}; name one of those that are there: {', '.join(names)}.", 2)
    return found[0]

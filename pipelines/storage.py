"""One way to open local paths and s3:// URIs: pyarrow's file systems, with errors a person can mend.

Credentials, region and endpoint of S3 come from the usual AWS_* variables.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import pyarrow.fs as pafs

from pipelines.settings import UserError

COPIED_AT_ONCE = 2**24  # bytes
ASKING, WORKING = 3, 10  # times S3 is tried: a wrong address is to be said soon, a night's work outlasts a busy store


def filesystem(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """A local path, file:// or s3:// URI that exists -> (file system, path in it).

    Raises UserError (exit code 2) where there is nothing, the bucket is missing, or access is denied.
    """
    try:
        fs, path = locate(uri)
        info = fs.get_file_info(path)
    except OSError as error:
        raise UserError(f"{uri} cannot be read: {explain(error)}", 2) from error
    if info.type == pafs.FileType.NotFound:
        what = "no bucket or folder" if fs.type_name == "s3" else "no file or folder"
        raise UserError(f"There is {what} {uri}.", 2)
    return fs, path


def locate(uri: str | Path, attempts: int = ASKING) -> tuple[pafs.FileSystem, str]:
    """As `filesystem`, whether or not something is there. attempts: how often S3 is tried, waiting ever longer."""
    text = str(uri)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{text!a} is not UTF-8; rename it.", 2) from error
    scheme, separator, rest = text.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    if scheme == "file":
        return pafs.LocalFileSystem(), plain(text)
    if scheme != "s3":
        raise UserError(f"{text} cannot be opened; give a local path or an s3:// URI.", 2)
    path = rest.strip("/")
    if not path:
        raise UserError(f"{text} names no bucket; write s3://BUCKET/PREFIX.", 2)
    if "//" in path:
        raise UserError(f"{text} has an empty part (two slashes), which cannot be read here; rename what it names.", 2)
    return _s3(path.partition("/")[0], attempts), path


def kind(uri: str | Path) -> pafs.FileType:
    """NotFound, File or Directory. Raises UserError (exit code 2) where that cannot be known."""
    try:
        fs, path = locate(uri)
        return fs.get_file_info(path).type
    except OSError as error:
        raise UserError(f"{uri} cannot be read: {explain(error)}", 2) from error


def join(folder: str | Path, name: str) -> str:
    """`name`, relative to a local folder or s3:// prefix, unless it is an absolute path or a URI itself."""
    name = plain(name)
    if is_remote(name) or name.startswith("/"):
        return name
    if not is_remote(folder):
        return str(Path(folder) / name)
    bucket, _, prefix = str(folder).removeprefix("s3://").partition("/")
    return f"s3://{bucket}/{posixpath.normpath(posixpath.join(prefix, name))}".removesuffix("/.")


def is_remote(uri: str | Path) -> bool:
    """Whether it is in an object store."""
    return str(uri).startswith("s3://")


def plain(uri: str | Path) -> str:
    """The path of a file:// URI, whatever else as it is."""
    text = str(uri)
    return unquote(urlsplit(text).path) if text.startswith("file://") else text


def list_files(uri: str | Path, recursive: bool = False) -> dict[str, pafs.FileInfo]:
    """The files below a folder or prefix, by their names relative to it. Raises UserError (exit code 2).

    Links are followed, but not back to a folder that led to them.
    """
    fs, path = filesystem(uri)
    try:
        local = recursive and fs.type_name == "local"  # where pyarrow goes round in a loop of links
        found = fs.get_file_info(list(_below(path)) if local else pafs.FileSelector(path, recursive=recursive))
        return {info.path.removeprefix(path).lstrip("/"): info for info in found if info.type == pafs.FileType.File}
    except OSError as error:
        raise UserError(f"{uri} cannot be listed: {explain(error)}", 2) from error
    except UnicodeError as error:
        raise UserError(f"{uri} holds a file whose name is not UTF-8; rename it.", 2) from error


def _below(folder: str, above: tuple[Path, ...] = ()) -> Iterator[str]:
    """The paths of all files below a local folder. Raises OSError."""
    above = (*above, Path(os.path.realpath(folder)))
    with os.scandir(folder) as entries:
        for entry in entries:
            if not os.path.exists(entry.path):
                continue  # a link to nothing, or round to itself
            if not entry.is_dir():
                yield entry.path
            elif not any(place.is_relative_to(os.path.realpath(entry.path)) for place in above):
                yield from _below(entry.path, above)


def fetch(uri: str | Path, folder: Path) -> Path:
    """A file or folder -> its local path: where it is, or a copy in `folder` of what an object store has."""
    fs, path = filesystem(uri)
    if fs.type_name == "local":
        return Path(path)
    copy = folder / PurePosixPath(path).name
    try:
        if fs.get_file_info(path).type == pafs.FileType.Directory:
            copy.mkdir()
        pafs.copy_files(path, str(copy), source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem())
    except OSError as error:
        raise UserError(f"{uri} cannot be read: {explain(error)}", 2) from error
    return copy


class WholeFiles(pafs.LocalFileSystem):
    """The local file system, where a file that is written appears when all of it is there, as on S3.

    For those who call it from Python: Ray Train would leave half a list of its checkpoints on a full disk.
    """

    def __reduce__(self):
        return WholeFiles, ()

    @contextmanager
    def open_output_stream(self, path: str, *args, **kwargs) -> Iterator[BinaryIO]:
        part = f"{path}.part"
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise


def copy_verified(folder: Path, fs: pafs.FileSystem, place: str) -> None:
    """Copy a local folder to `place` of a file system, and read every file back.

    Raises OSError where one cannot be written, or is not what was written.
    """
    for source in sorted(path for path in folder.rglob("*") if path.is_file()):
        target = f"{place}/{source.relative_to(folder).as_posix()}"
        fs.create_dir(posixpath.dirname(target), recursive=True)
        written, found = hashlib.sha256(), hashlib.sha256()
        with source.open("rb") as file, fs.open_output_stream(target) as out:
            while piece := file.read(COPIED_AT_ONCE):
                written.update(piece)
                out.write(piece)
        with fs.open_input_stream(target) as file:
            while piece := file.read(COPIED_AT_ONCE):
                found.update(piece)
        if written.digest() != found.digest():
            raise OSError(f"{target} is not what was written to it; the storage is not to be trusted")


def read_file(uri: str | Path, largest: int | None = None) -> tuple[bytes | None, str | None]:
    """(the bytes of a file, None), or (None, why they cannot be had).

    Raises UserError (exit code 1) where it is the object store that does not answer.
    """
    try:
        fs, path = locate(uri, WORKING)
        if fs.type_name == "local":
            info = fs.get_file_info(path)
            if info.type not in (pafs.FileType.File, pafs.FileType.NotFound):  # reading a pipe would wait for ever
                return None, "it is not a file"
        with fs.open_input_file(path) as stream:
            if largest is not None and stream.size() > largest:
                return None, f"the file is larger than {largest >> 20} MiB"
            return stream.read(), None
    except FileNotFoundError:
        return None, "there is no such file"
    except OSError as error:
        if is_denied(error):
            return None, "access to it is denied"
        if is_remote(uri):
            raise UserError(f"{uri} cannot be read: {explain(error)}") from error
        return None, f"it cannot be read ({os.strerror(error.errno or errno.EIO)})"


def from_task(error: Exception) -> UserError | None:
    """The UserError by which a Ray task ended, which is in the text of Ray's error only."""
    causes = re.findall(r"UserError: (.+)$", str(error), re.MULTILINE)
    return UserError(f"{causes[-1].rstrip('.')}; what was done is kept, so run it again.") if causes else None


def explain(error: OSError) -> str:
    """What an error of a file system means, in a sentence."""
    text = " ".join(str(error).split())
    if is_denied(error):
        return "access is denied; check who may read it (on S3, the AWS_* variables)."
    if "NO_SUCH_BUCKET" in text or "NoSuchBucket" in text:
        return "there is no such bucket."
    if "NETWORK_CONNECTION" in text or "curlCode" in text:
        return "the object store does not answer; check AWS_ENDPOINT_URL and the network."
    return text.rstrip(".") + "."


def is_denied(error: OSError) -> bool:
    """Whether the error says that the file or bucket is there, but not for us."""
    text = str(error)
    return isinstance(error, PermissionError) or any(
        mark in text for mark in ("ACCESS_DENIED", "AccessDenied", "HTTP status 403", "HTTP status 401")
    )


@lru_cache(maxsize=8)
def _s3(bucket: str, attempts: int) -> pafs.S3FileSystem:
    options: dict[str, Any] = {"retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=attempts)}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        parts = urlsplit(endpoint)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if endpoint else pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(region=region, connect_timeout=10, request_timeout=60, **options)

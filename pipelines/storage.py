"""One way to open local paths and s3:// URIs: pyarrow's file systems, with errors a person can mend.

Credentials, region and endpoint of S3 come from the usual AWS_* variables.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import pyarrow.fs as pafs

from pipelines.settings import UserError


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


def locate(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """As `filesystem`, whether or not something is there."""
    text = str(uri)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    if scheme == "file":
        return pafs.LocalFileSystem(), unquote(urlsplit(text).path)
    if scheme != "s3":
        raise UserError(f"{text} cannot be opened; give a local path or an s3:// URI.", 2)
    path = rest.strip("/")
    if not path:
        raise UserError(f"{text} names no bucket; write s3://BUCKET/PREFIX.", 2)
    return _s3(path.partition("/")[0]), path


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
def _s3(bucket: str) -> pafs.S3FileSystem:
    options = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        parts = urlsplit(endpoint)
        options = {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if endpoint else pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(region=region, connect_timeout=10, request_timeout=60, **options)

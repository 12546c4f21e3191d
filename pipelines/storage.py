"""One way to open local paths and s3:// URIs: pyarrow's file systems, with errors a person can mend.

What pyarrow does not know of S3 (ETags, writing only where nothing is) boto3 does. Credentials, region and endpoint of
S3 come from the usual AWS_* variables.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import re
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow.fs as pafs
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    SSLError,
)
from botocore.exceptions import ConnectionError as NoConnectionError

from pipelines.settings import UserError

COPIED_AT_ONCE = 2**24  # bytes
ASKING, WORKING = 3, 46  # times S3 is tried: a wrong address is to be said soon, a night's work outlasts a busy store
PATIENCE = 600  # seconds after which S3 is not tried again; WORKING tries and their pauses take as long
CONNECTIONS = 64  # that one process keeps to S3
# Why a file that was listed cannot be had, where that does not lie in its bytes: how all reasons begin that may be
# otherwise at the next try.
GONE, DENIED, CHANGED = "there is no such file", "access to it is denied", "it changed after it was listed"
NO_FILE, UNREADABLE, NOT_GIVEN = "it is not a file", "it cannot be read", "the store cannot give it"
TRY_AGAIN = (GONE, DENIED, CHANGED, NO_FILE, UNREADABLE, NOT_GIVEN)
# Of what S3 refuses, what it may refuse of one object: "403" and "" are of an answer without a word.
DENIED_ALONE = ("AccessDenied", "AllAccessDisabled", "403", "")
OUT_OF_DATE = ("ExpiredToken", "InvalidToken", "RequestExpired", "TokenRefreshRequired")  # said with status 400, too
# The last two: of a bucket in another region.
NO_BUCKET = ("NoSuchBucket", "InvalidBucketName", "PermanentRedirect", "AuthorizationHeaderMalformed")
NO_SUCH_BUCKET = "there is no such bucket."
WRONG_NAMES = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
AWAY = (NoConnectionError, HTTPClientError)
T = TypeVar("T")


def filesystem(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """A local path, file:// or s3:// URI that exists -> (file system, path in it).

    Raises UserError: exit code 2 where there is nothing, the bucket is missing, or access is denied; 1 where it does
    not answer.
    """
    try:
        fs, path = locate(uri)
        info = fs.get_file_info(path)
    except OSError as error:
        raise not_done(uri, "read", error) from error
    if info.type == pafs.FileType.NotFound:
        said = f"There is no bucket or folder {uri}." if fs.type_name == "s3" else f"There is no file or folder {uri}."
        raise UserError(said, 2)
    return fs, path


def locate(uri: str | Path, attempts: int = ASKING) -> tuple[pafs.FileSystem, str]:
    """As `filesystem`, whether or not something is there. attempts: how often S3 is tried, waiting ever longer."""
    bucket, path = bucket_and_key(uri)
    if bucket is None:
        return pafs.LocalFileSystem(), path
    path = f"{bucket}/{path}".strip("/")
    if "//" in path:
        raise UserError(f"{uri} has an empty part (two slashes), which cannot be read here; rename what it names.", 2)
    return _s3(bucket, attempts), path


def bucket_and_key(uri: str | Path) -> tuple[str | None, str]:
    """s3://BUCKET/KEY -> (BUCKET, KEY); a local path or file:// URI -> (None, its absolute path).

    Raises UserError (exit code 2) for what is neither.
    """
    text = str(uri)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{text!a} is not UTF-8; rename it.", 2) from error
    scheme, separator, rest = text.partition("://")
    if not separator:
        return None, str(Path(text).expanduser().absolute())
    if scheme == "file":
        return None, plain(text)
    if scheme != "s3":
        raise UserError(f"{text} cannot be opened; give a local path or an s3:// URI.", 2)
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise UserError(f"{text} names no bucket; write s3://BUCKET/PREFIX.", 2)
    return bucket, key


def kind(uri: str | Path) -> pafs.FileType:
    """NotFound, File or Directory. Raises UserError where that cannot be known."""
    try:
        fs, path = locate(uri)
        return fs.get_file_info(path).type
    except OSError as error:
        raise not_done(uri, "read", error) from error


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
    """The files below a folder or prefix, by their names relative to it. Raises UserError.

    Links are followed, but not back to a folder that led to them.
    """
    fs, path = filesystem(uri)
    try:
        local = recursive and fs.type_name == "local"  # where pyarrow goes round in a loop of links
        found = fs.get_file_info(list(files_below(path)) if local else pafs.FileSelector(path, recursive=recursive))
        return {info.path.removeprefix(path).lstrip("/"): info for info in found if info.type == pafs.FileType.File}
    except OSError as error:
        raise not_done(uri, "listed", error) from error
    except UnicodeError as error:
        raise UserError(f"{uri} holds a file whose name is not UTF-8; rename it.", 2) from error


def files_below(folder: str, above: tuple[Path, ...] = ()) -> Iterator[str]:
    """The paths of all files below a local folder, links followed as `list_files` does. Raises OSError."""
    above = (*above, Path(os.path.realpath(folder)))
    with os.scandir(folder) as entries:
        for entry in entries:
            if not os.path.exists(entry.path):
                continue  # a link to nothing, or round to itself
            if not entry.is_dir():
                yield entry.path
            elif not any(place.is_relative_to(os.path.realpath(entry.path)) for place in above):
                yield from files_below(entry.path, above)


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
        raise not_done(uri, "read", error) from error
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

    Raises UserError where it is the object store: exit code 1 if it does not answer.
    """
    try:
        fs, path = locate(uri, WORKING)
        if fs.type_name == "local":
            info = fs.get_file_info(path)
            if info.type not in (pafs.FileType.File, pafs.FileType.NotFound):  # reading a pipe would wait for ever
                return None, NO_FILE
        with fs.open_input_file(path) as stream:
            if largest is not None and stream.size() > largest:
                return None, f"the file is larger than {largest >> 20} MiB"
            return stream.read(), None
    except FileNotFoundError:
        return None, GONE
    except OSError as error:
        if is_denied(error):
            return None, DENIED
        if is_remote(uri):
            raise not_done(uri, "read", error) from error
        return None, f"{UNREADABLE} ({os.strerror(error.errno or errno.EIO)})"


def read_listed(uri: str, etag: str, size: int) -> tuple[bytes | None, str | None]:
    """(the bytes of a file that was listed with this etag and size, None), or (None, why they cannot be had).

    Of a file that was not there then (etag ""), too. Raises UserError where others would fare alike, as `reason_of`.
    """
    bucket, key = bucket_and_key(uri)
    if bucket is None:
        return _read_local(key, etag)

    def ask() -> bytes | None:
        answer = s3_client(1).get_object(Bucket=bucket, Key=key)
        if (answer["ETag"].strip('"'), answer.get("ContentLength", size)) == (etag, size):
            return answer["Body"].read()
        answer["Body"].close()  # of what may be anything now, nothing is read
        return None

    try:
        data = patiently(ask)
    except (BotoCoreError, ClientError) as error:
        return None, reason_of(uri, error)
    return (data, None) if data is not None and len(data) == size else (None, CHANGED)


def reason_of(uri: str, error: Exception) -> str:
    """Why an object cannot be had, where S3's error is of this one alone.

    Raises UserError otherwise: exit code 2 for the account, its clock and its bucket, 1 where the store does not
    answer. So a damaged object does not end the work, and credentials that run out do not make reasons of the rest.
    """
    code = _code(error)
    if is_missing(error):
        return GONE
    if isinstance(error, ParamValidationError):
        return explain(error).rstrip(".")
    if is_transient(error):
        ask = partial(s3_client(1).list_objects_v2, Bucket=bucket_and_key(uri)[0], MaxKeys=1)
        try:
            patiently(ask, ASKING)
        except (BotoCoreError, ClientError) as other:
            if is_transient(other):
                raise not_done(uri, "read", error) from error
            if not _is_of_one(other):
                raise not_done(uri, "read", other) from error
    elif not _is_of_one(error):
        raise not_done(uri, "read", error) from error
    elif is_denied(error):
        return DENIED
    return f"{NOT_GIVEN} ({code or type(error).__name__})"


def _is_of_one(error: Exception) -> bool:
    """Whether an error that lasts may be of one object alone."""
    if not isinstance(error, ClientError) or _code(error) in NO_BUCKET:
        return False
    return not is_denied(error) or _code(error) in DENIED_ALONE


def _read_local(path: str, etag: str) -> tuple[bytes | None, str | None]:
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
            return None, NO_FILE
        if etag_of(info) != etag:
            return None, CHANGED
        with open(path, "rb") as file:
            data = file.read(info.st_size + 1)  # no more than that, however it grows
            found = etag_of(os.fstat(file.fileno()))
    except FileNotFoundError:
        return None, GONE
    except PermissionError:
        return None, DENIED
    except OSError as error:
        return None, f"{UNREADABLE} ({os.strerror(error.errno or errno.EIO)})"
    return (data, None) if (found, len(data)) == (etag, info.st_size) else (None, CHANGED)


def etag_of(info: os.stat_result) -> str:
    """What changes when a local file does, as an object's ETag."""
    return f"{info.st_mtime_ns:x}-{info.st_size:x}"


class Folder:
    """A folder that results are written to: a local one or an s3:// prefix, which need not be there yet.

    Names are relative, with forward slashes; those of files begin with no dot. Where a file cannot be read or
    written a UserError says so: exit code 2 where access is denied or there is no such bucket, 1 where the store does
    not answer or the disk is full. attempts: how often S3 is tried, waiting ever longer.
    """

    def __init__(self, uri: str | Path, attempts: int = WORKING):
        bucket, path = bucket_and_key(uri)
        self.uri = path if bucket is None else f"s3://{bucket}/{path}".rstrip("/")
        self.attempts = attempts

    def place(self, name: str) -> str:
        """The URI of a file, or its local path."""
        return f"{self.uri}/{name}"

    def get(self, name: str) -> bytes | None:
        """The bytes of a file, None where there is none."""
        with self._said(name, "read"):
            if not is_remote(self.uri):
                try:
                    return Path(self.place(name)).read_bytes()
                except FileNotFoundError:
                    return None
            try:
                return patiently(lambda: s3_client(1).get_object(**self._address(name))["Body"].read(), self.attempts)
            except ClientError as error:
                if not is_missing(error):
                    raise
                return None

    def put(self, name: str, data: bytes) -> None:
        """Write a file, which others see whole or as it was."""
        with self._said(name, "written"):
            if is_remote(self.uri):
                patiently(lambda: s3_client(1).put_object(**self._address(name), Body=data), self.attempts)
                return
            with self._part(name, data) as part:
                os.replace(part, self.place(name))

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one of that name; whether it was written.

        Of several who do so at a time one is told True, as far as the storage can tell them apart. One whose answer
        was lost is told False though the file is its own, so look at what is there.
        """
        with self._said(name, "written"):
            return self._create_object(name, data) if is_remote(self.uri) else self._create_file(name, data)

    def names(self, prefix: str) -> list[str]:
        """The sorted names of the files in one folder that begin so: "0001/commit-", or "0001/" for all in it."""
        with self._said(prefix, "listed"):
            if not is_remote(self.uri):
                place, _, start = prefix.rpartition("/")
                try:
                    with os.scandir(self.place(place)) as entries:
                        found = [e.name for e in entries if e.name.startswith(start or "") and e.is_file()]
                except FileNotFoundError:
                    return []
                return sorted(posixpath.join(place, name) for name in found if not name.startswith("."))
            address, above = self._address(prefix), len(self._address("")["Key"])
            found, page = [], {}
            while page.get("IsTruncated", True):
                token = page.get("NextContinuationToken")
                page = list_page(address["Bucket"], address["Key"], token, "/", self.attempts)
                found += [entry["Key"][above:] for entry in page.get("Contents", ())]
            return sorted(found)

    def delete(self, name: str) -> None:
        """Remove a file, if there is one."""
        with self._said(name, "deleted"):
            if is_remote(self.uri):
                patiently(lambda: s3_client(1).delete_object(**self._address(name)), self.attempts)
            else:
                Path(self.place(name)).unlink(missing_ok=True)

    def _address(self, name: str) -> dict[str, str]:
        bucket, key = bucket_and_key(self.place(name))
        return {"Bucket": bucket, "Key": key}

    @contextmanager
    def _said(self, name: str, what: str) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError, OSError) as error:
            raise not_done(self.place(name), what, error) from error

    @contextmanager
    def _part(self, name: str, data: bytes) -> Iterator[str]:
        """A file of these bytes beside the one that it is to become."""
        place = Path(self.place(name))
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        try:
            with part.open("wb") as file:
                _write(file, data)
            yield str(part)
        finally:
            part.unlink(missing_ok=True)

    def _create_file(self, name: str, data: bytes) -> bool:
        with self._part(name, data) as part:
            try:
                os.link(part, self.place(name))
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
            else:
                return True
        try:
            opened = os.open(self.place(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:  # a kill here leaves half a file; there is no better way where a file has but one name
            with os.fdopen(opened, "wb") as file:
                _write(file, data)
        except BaseException:
            self.delete(name)
            raise
        return True

    def _create_object(self, name: str, data: bytes) -> bool:
        address = self._address(name)
        try:
            patiently(lambda: s3_client(1).put_object(**address, Body=data, IfNoneMatch="*"), self.attempts)
            return True
        except ClientError as error:
            if _status(error) in (409, 412):
                return False
            if _status(error) not in (400, 501):
                raise
        # A store that does not know the condition. Two may write at once then, each the whole file.
        try:
            patiently(lambda: s3_client(1).head_object(**address), self.attempts)
            return False
        except ClientError as error:
            if not is_missing(error):
                raise
        patiently(lambda: s3_client(1).put_object(**address, Body=data), self.attempts)
        return True


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def list_page(
    bucket: str, prefix: str, token: str | None = None, delimiter: str = "", attempts: int = WORKING
) -> dict[str, Any]:
    """One answer of ListObjectsV2: up to 1,000 keys that begin so; token: the NextContinuationToken of the last one."""
    more = {"ContinuationToken": token} if token else {}
    ask = partial(s3_client(1).list_objects_v2, Bucket=bucket, Prefix=prefix, Delimiter=delimiter, **more)
    return patiently(ask, attempts)


def patiently(ask: Callable[[], T], attempts: int = WORKING) -> T:
    """What ask() returns, asked again after ever longer pauses while S3 is busy or away.

    boto3's own retries end where the body of an answer begins, and share what they may use up among all threads of a
    process: after 35 of them a store that is away for seconds is given up. So ask() does without (`s3_client(1)`).
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_random_exponential

    pauses = wait_random_exponential(multiplier=0.5, max=30)  # seconds
    stop = stop_after_attempt(attempts) | stop_after_delay(PATIENCE)  # a store that hangs takes a minute a try
    return Retrying(retry=retry_if_exception(is_transient), stop=stop, wait=pauses, reraise=True)(ask)


@lru_cache(maxsize=8)
def s3_client(attempts: int = ASKING):
    """This process's boto3 client of S3, which its threads share; attempts: how often each request is tried.

    Dates in its answers are texts.
    """
    import boto3
    import botocore.session
    from botocore.config import Config

    # Dates stay texts: nobody asks for those of a listing, and to parse them takes longer than all else.
    session = botocore.session.Session()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    retries = {"mode": "standard", "total_max_attempts": attempts}
    config = Config(connect_timeout=10, read_timeout=60, retries=retries, max_pool_connections=CONNECTIONS)
    region = region or ("us-east-1" if endpoint else None)
    make = boto3.session.Session(botocore_session=session).client
    try:  # buckets stand in the path of an endpoint that is told
        return make("s3", endpoint_url=endpoint, region_name=region, config=config)
    except ValueError as error:
        raise UserError("AWS_ENDPOINT_URL is no address; write one such as https://s3.example.org.", 2) from error


if hasattr(os, "register_at_fork"):  # a connection is of one process
    os.register_at_fork(after_in_child=s3_client.cache_clear)


def from_task(error: Exception) -> UserError | None:
    """The UserError by which a Ray task ended, which is in the text of Ray's error only."""
    causes = re.findall(r"UserError: (.+)\nexit code (\d)$", str(error), re.MULTILINE)
    if not causes:
        return None
    why, code = causes[-1]
    return UserError(f"{why.rstrip('.')}; what was done is kept, so run it again.", int(code))


def not_done(uri: str | Path, what: str, error: Exception) -> UserError:
    """That a file cannot be `what` (read, written, listed), and why.

    Exit code 2 where somebody must let us or give another name, 1 where the disk, store or network failed.
    """
    ours = isinstance(error, BotoCoreError) and not is_transient(error)  # credentials, certificates, names
    no_bucket = _code(error) in NO_BUCKET or explain(error) == NO_SUCH_BUCKET
    code = 2 if ours or no_bucket or is_denied(error) or isinstance(error, WRONG_NAMES) else 1
    return UserError(f"{uri} cannot be {what}: {explain(error)}", code)


def explain(error: Exception) -> str:
    """What an error of a file system or of S3 means, in a sentence."""
    text = " ".join(str(error).split())
    if is_denied(error):
        said = "" if _code(error) in DENIED_ALONE else f" ({_code(error)})"
        return f"access is denied{said}; check who may read it (on S3, the AWS_* variables)."
    if "NO_SUCH_BUCKET" in text or "NoSuchBucket" in text:
        return NO_SUCH_BUCKET
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
    if isinstance(error, ParamValidationError):
        return "its bucket's name or its own is not one that S3 takes."
    if isinstance(error, ClientError):
        if is_transient(error):
            return f"the object store is busy or broken ({_code(error)}); try again later."
        return f"the object store says {_code(error)} ({error.response['Error'].get('Message', '').rstrip('.')})."
    if isinstance(error, SSLError):
        return f"the object store's certificate is not trusted ({text.rstrip('.')})."
    if "NETWORK_CONNECTION" in text or "curlCode" in text or isinstance(error, AWAY):
        return "the object store does not answer; check AWS_ENDPOINT_URL and the network."
    return text.rstrip(".") + "."


def is_denied(error: Exception) -> bool:
    """Whether the error says that the file or bucket is there, but not for us."""
    if isinstance(error, ClientError):
        archived = _code(error) == "InvalidObjectState"  # 403, but nobody may read it before it is restored
        return (_status(error) in (401, 403) and not archived) or _code(error) in OUT_OF_DATE
    text = str(error)
    return isinstance(error, PermissionError) or any(
        mark in text for mark in ("ACCESS_DENIED", "AccessDenied", "HTTP status 403", "HTTP status 401")
    )


def is_missing(error: Exception) -> bool:
    """Whether S3 says that there is no such file."""
    return _code(error) in ("NoSuchKey", "404")  # the latter where an answer has no body, as to HEAD


def is_transient(error: BaseException) -> bool:
    """Whether S3 may answer the same request otherwise in a while."""
    if isinstance(error, ClientError):
        status = _status(error)
        return status in (408, 409, 429) or (status >= 500 and status != 501) or _code(error) == "RequestTimeout"
    return isinstance(error, (*AWAY, IncompleteReadError, FlexibleChecksumError)) and not isinstance(error, SSLError)


def _code(error: Exception) -> str:
    """What S3 calls an error; of an answer without a body its HTTP status."""
    return error.response["Error"].get("Code", "") if isinstance(error, ClientError) else ""


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


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

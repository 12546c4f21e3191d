"""Local paths and s3:// URIs, and what is said when they cannot be opened."""

import http.server
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pyarrow.fs as pafs
import pytest
from botocore.exceptions import ConnectTimeoutError

from pipelines import storage
from pipelines.listing import find_images, list_images
from pipelines.settings import RunSettings, UserError
from pipelines.storage import (
    ASKING,
    PATIENCE,
    TRY_AGAIN,
    WORKING,
    Folder,
    _s3,
    etag_of,
    fetch,
    filesystem,
    from_task,
    join,
    kind,
    list_files,
    patiently,
    read_file,
    read_listed,
    s3_client,
)


@contextmanager
def s3_server(answer):
    """A server on loopback; answer(request) gives (status, body), or (status, body, headers of its own)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # which says "continue" to who asks before a body is sent

        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body, *headers = answer(self)
            own = dict(*headers)
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Connection", "close")
            self.send_header("Content-Length", own.pop("Content-Length", str(len(body))))
            for name, value in own.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def serve(monkeypatch):
    """serve(answer) starts a server that is the S3 endpoint until the test ends."""
    with ExitStack() as stack:

        def start(answer):
            monkeypatch.setenv("AWS_ENDPOINT_URL", stack.enter_context(s3_server(answer)))
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            _s3.cache_clear()
            s3_client.cache_clear()

        yield start
        _s3.cache_clear()
        s3_client.cache_clear()


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that would have been waited."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def error(code):
    return b"<Error><Code>%s</Code><Message>no</Message></Error>" % code


def test_a_local_file_is_read_by_path_and_by_uri(tmp_path):
    (tmp_path / "a b.txt").write_bytes(b"hello")
    for uri in (tmp_path / "a b.txt", (tmp_path / "a b.txt").as_uri()):
        fs, path = filesystem(uri)
        assert fs.open_input_file(path).read() == b"hello"


@pytest.mark.parametrize(
    "uri, words",
    [
        ("no/such/folder", "There is no file or folder no/such/folder"),
        ("file:///no/such/folder", "There is no file or folder"),
        ("s3://", "names no bucket"),
        ("gs://bucket/x", "a local path or an s3:// URI"),
    ],
)
def test_what_is_not_there_is_said(uri, words):
    with pytest.raises(UserError, match=words) as error:
        filesystem(uri)
    assert error.value.exit_code == 2


def test_a_bucket_that_is_missing_or_closed_is_said(serve):
    denied, missing = (403, error(b"AccessDenied")), (404, error(b"NoSuchBucket"))
    serve(lambda request: denied if request.path.startswith("/closed") else missing)
    with pytest.raises(UserError, match="access is denied") as found:
        filesystem("s3://closed/images")
    assert found.value.exit_code == 2
    with pytest.raises(UserError, match="There is no bucket or folder s3://missing/images"):
        filesystem("s3://missing/images")


def test_a_store_that_does_not_answer_is_a_failure_and_what_we_may_not_see_is_wrong_use(serve, tmp_path, monkeypatch):
    asks = (filesystem, kind, list_files, lambda uri: fetch(uri, tmp_path))
    serve(lambda request: (403, error(b"AccessDenied")))
    for ask in asks:
        with pytest.raises(UserError, match="access is denied") as found:
            ask("s3://closed/images")
        assert found.value.exit_code == 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    _s3.cache_clear()
    s3_client.cache_clear()
    for ask in asks:
        with pytest.raises(UserError, match=r"s3://away/images cannot be .*the object store does not answer") as found:
            ask("s3://away/images")
        assert found.value.exit_code == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device"), 1), (OSError(5, "Input/output error"), 1),
        (PermissionError(13, "Permission denied"), 2), (FileExistsError(17, "File exists"), 2),
        (NotADirectoryError(20, "Not a directory"), 2), (FileNotFoundError(2, "No such file or directory"), 2),
    ],
)  # fmt: skip
def test_a_disk_that_fails_is_a_failure_and_a_name_that_cannot_be_is_wrong_use(error, code):
    assert storage.not_done("/some/file", "written", error).exit_code == code


def test_a_store_that_is_busy_for_a_while_is_waited_for(serve):
    asked = []

    def answer(request):
        asked.append(request.path)
        return (503, error(b"SlowDown")) if len(asked) <= ASKING else (200, b"picture")

    serve(answer)
    assert read_file("s3://bucket/a.jpg") == (b"picture", None)
    assert len(asked) > ASKING and set(asked) == {"/bucket/a.jpg"}


def test_what_is_local_is_used_where_it_is_and_what_is_not_is_copied(tmp_path, monkeypatch):
    (tmp_path / "bucket" / "best").mkdir(parents=True)
    (tmp_path / "bucket" / "best" / "config.json").write_text("{}")
    (tmp_path / "bucket" / "w.pth").write_bytes(b"weights")
    place = tmp_path / "here"
    place.mkdir()
    local = (tmp_path / "bucket" / "w.pth").as_uri()
    assert fetch(local, place) == tmp_path / "bucket" / "w.pth" and not list(place.iterdir())

    remote = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())  # stands for an object store
    monkeypatch.setattr(storage, "locate", lambda uri: (remote, str(uri).removeprefix("s3://")))
    assert fetch("s3://bucket/w.pth", place).read_bytes() == b"weights"
    assert (fetch("s3://bucket/best", place) / "config.json").read_text() == "{}"
    assert sorted(p.name for p in place.iterdir()) == ["best", "w.pth"]


@pytest.mark.parametrize(
    "folder,name,place",
    [
        ("/data", "images", "/data/images"),
        ("/data", "/photos", "/photos"),
        ("/data", "file:///a%20b", "/a b"),
        ("/data", "s3://bucket/x", "s3://bucket/x"),
        ("s3://bucket/data/", "images", "s3://bucket/data/images"),
        ("s3://bucket/data", ".", "s3://bucket/data"),
        ("s3://bucket", ".", "s3://bucket"),
        ("s3://bucket/data", "../photos", "s3://bucket/photos"),
        ("s3://bucket/data", "/photos", "/photos"),
    ],
)
def test_names_are_joined_to_folders_and_prefixes(folder, name, place):
    assert join(folder, name) == place


def test_what_cannot_be_asked_is_one_sentence(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="is not UTF-8; rename it"):
        kind("/data/\udcff")
    with pytest.raises(UserError, match="has an empty part"):
        kind("s3://bucket//images")

    def no_network(bucket, attempts):
        raise OSError("When resolving region for bucket: curlCode: 6, Couldn't resolve host name")

    monkeypatch.setattr(storage, "_s3", no_network)
    for ask in (kind, filesystem, list_files, read_file):
        with pytest.raises(UserError, match="s3://bucket/x cannot be read: the object store does not answer"):
            ask("s3://bucket/x")
    (tmp_path / "f").write_bytes(b"")
    os.rename(os.fsencode(tmp_path / "f"), os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(UserError, match="not UTF-8; rename it"):
        list_files(tmp_path)
    with pytest.raises(UserError, match="not UTF-8; rename it"):
        list_files(tmp_path, recursive=True)


def test_links_are_followed_but_not_round_and_round(tmp_path):
    for place in ("photos/day", "elsewhere"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.jpg").write_bytes(b"12")
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "day" / "up").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "photos" / "self").symlink_to("self")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos" / "day")  # whose `up` leads here again
    found = list_files(tmp_path / "photos", recursive=True)
    assert {name: info.size for name, info in found.items()} == {
        name: 2 for name in ("day/a.jpg", "more/a.jpg", "more/back/a.jpg")
    }


def test_the_reason_of_a_task_is_found_in_rays_text():
    for code in (1, 2):
        raised = UserError("s3://b/a.jpg cannot be read: it is away.", code)
        text = "".join(traceback.format_exception(raised))  # what Ray keeps of it
        error = from_task(RuntimeError(f"ray::map() (pid=1)\n  File x\n{text}\nThe above exception was the cause\n"))
        assert str(error) == "s3://b/a.jpg cannot be read: it is away; what was done is kept, so run it again."
        assert error.exit_code == code
    assert from_task(RuntimeError("KeyError: 1")) is None


def test_a_file_that_cannot_be_read_has_a_reason(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    assert read_file(tmp_path / "a") == (b"12345", None)
    assert read_file(tmp_path / "a", 4) == (None, "the file is larger than 0 MiB")
    assert read_file(tmp_path / "none") == (None, "there is no such file")
    assert read_file(tmp_path / "pipe")[1] == read_file(tmp_path)[1] == "it is not a file"


# --- files that were listed


def test_a_local_file_is_read_if_it_is_as_listed(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"")
    etag = etag_of(path.stat())
    assert read_listed(str(path), etag, 5) == read_listed(path.as_uri(), etag, 5) == (b"12345", None)
    assert read_listed(str(tmp_path / "b"), etag_of((tmp_path / "b").stat()), 0) == (b"", None)
    changed = (None, "it changed after it was listed")
    os.utime(path, ns=(1, 1))
    assert etag_of(path.stat()) != etag and read_listed(str(path), etag, 5) == changed
    assert read_listed(str(path), "", 0) == changed  # it came
    path.unlink()
    assert read_listed(str(path), etag, 5) == read_listed(str(path), "", 0) == (None, "there is no such file")
    os.mkfifo(path)
    assert read_listed(str(path), etag, 5) == read_listed(str(tmp_path), "", 0) == (None, "it is not a file")
    for reason in ("there is no such file", changed[1], "it is not a file"):
        assert reason.startswith(TRY_AGAIN)


def test_a_local_file_that_we_may_not_read_has_its_reason(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"1")
    etag, errors = etag_of((tmp_path / "a").stat()), []

    def refuse(*args, **kwargs):  # root, as whom tests may run, is refused nothing
        raise errors[-1]

    monkeypatch.setattr("builtins.open", refuse)
    for error, reason in ((PermissionError(13, ""), "access to it is denied"),
                          (OSError(5, ""), "it cannot be read (Input/output error)")):  # fmt: skip
        errors.append(error)
        assert read_listed(str(tmp_path / "a"), etag, 1) == (None, reason) and reason.startswith(TRY_AGAIN)
    assert read_listed(str(tmp_path / "a"), "x", 1) == (None, "it changed after it was listed")  # unopened


def test_of_a_local_file_that_grows_while_it_is_read_no_more_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    info = path.stat()
    path.write_bytes(bytes(2**24))
    monkeypatch.setattr(os, "stat", lambda *_, **__: info)
    tracemalloc.start()
    found = read_listed(str(path), etag_of(info), 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == (None, "it changed after it was listed") and peak < 2**20


@pytest.mark.parametrize("etag", ["e0", "e1"])
def test_of_an_object_that_was_replaced_nothing_is_read(serve, pauses, etag):
    """Its answer promises a gigabyte and breaks off, which is noticed where it is read."""
    asked = []

    def answer(request):
        asked.append(request.path)
        return 200, b"pict", {"ETag": f'"{etag}"', "Content-Length": str(2**30)}

    serve(answer)
    assert read_listed("s3://bucket/a.jpg", "e1", 7) == (None, "it changed after it was listed")
    assert len(asked) == 1 and not pauses


def test_an_answer_that_breaks_off_is_asked_for_again(serve, pauses):
    whole, asked = (200, b"picture", {"ETag": '"e1"'}), []

    def answer(request):
        asked.append(request.path)
        cut = (200, b"pict", {"ETag": '"e1"', "Content-Length": "7"})
        return {1: cut, 2: (503, error(b"SlowDown")), 3: cut}.get(len(asked), whole)

    serve(answer)
    assert read_listed("s3://bucket/a//b \u00fc%.jpg", "e1", 7) == (b"picture", None)
    assert asked == ["/bucket/a//b%20%C3%BC%25.jpg"] * 4 and len(pauses) == 3
    assert read_listed("s3://bucket/a.jpg", "e0", 7) == (None, "it changed after it was listed")


@pytest.mark.parametrize(
    "status, body, reason",
    [
        (404, error(b"NoSuchKey"), "there is no such file"),
        (403, error(b"AccessDenied"), "access to it is denied"),
        (403, error(b"AllAccessDisabled"), "access to it is denied"),
        (403, b"", "access to it is denied"),
        (403, error(b"InvalidObjectState"), "the store cannot give it (InvalidObjectState)"),  # archived
        (400, error(b"InvalidRequest"), "the store cannot give it (InvalidRequest)"),  # under a key of its own
    ],
)
def test_what_a_store_refuses_of_one_object_is_the_reason_at_once(serve, pauses, status, body, reason):
    serve(lambda request: (status, body))
    assert read_listed("s3://bucket/a.jpg", "e1", 7) == (None, reason) and not pauses
    assert reason.startswith(TRY_AGAIN)
    unfit = read_listed("s3://No Bucket/a.jpg", "e1", 7)[1]
    assert unfit == "its bucket's name or its own is not one that S3 takes" and not unfit.startswith(TRY_AGAIN)


@pytest.mark.parametrize(
    "status, code, words",
    [
        (404, "NoSuchBucket", "there is no such bucket"),
        (400, "AuthorizationHeaderMalformed", "AuthorizationHeaderMalformed"),  # of another region
        (400, "ExpiredToken", r"access is denied \(ExpiredToken\); check"),
        (403, "ExpiredToken", r"access is denied \(ExpiredToken\); check"),
        (400, "InvalidToken", r"access is denied \(InvalidToken\); check"),
        (403, "RequestTimeTooSkewed", r"access is denied \(RequestTimeTooSkewed\); check"),
        (403, "InvalidAccessKeyId", r"access is denied \(InvalidAccessKeyId\); check"),
        (403, "SignatureDoesNotMatch", r"access is denied \(SignatureDoesNotMatch\); check"),
    ],
)
def test_what_a_store_refuses_of_all_objects_ends_the_work(serve, pauses, tmp_path, status, code, words):
    """Or credentials that expire at night would make a reason of every image that was left."""
    serve(lambda request: (status, error(code.encode())))
    (tmp_path / "list.txt").write_text("s3://bucket/a.jpg\n")
    for ask in (lambda: read_listed("s3://bucket/a.jpg", "e1", 7),
                lambda: list_images(tmp_path / "list.txt", RunSettings())):  # fmt: skip
        with pytest.raises(UserError, match=f"s3://bucket/a.jpg cannot be read: .*{words}") as found:
            ask()
        assert found.value.exit_code == 2 and not pauses


def test_a_certificate_that_is_not_trusted_ends_the_work(serve, monkeypatch, pauses):
    from botocore.exceptions import SSLError

    def ask(**address):
        raise SSLError(endpoint_url="https://s3.example.org", error="certificate verify failed")

    serve(lambda request: (200, b""))
    monkeypatch.setattr(s3_client(1), "get_object", ask)
    with pytest.raises(UserError, match="certificate verify failed") as found:
        read_listed("s3://bucket/a.jpg", "e1", 7)
    assert found.value.exit_code == 2 and not pauses


def test_what_is_amiss_with_one_name_of_a_list_is_left_to_its_reading(serve, pauses, tmp_path):
    """A HEAD that fails does not say why, so that what it says is never the last word."""
    said = {"gone": (404, error(b"NoSuchKey")), "shut": (403, error(b"AccessDenied")),
            "bad": (500, error(b"InternalError"))}  # fmt: skip

    def answer(request):
        name = request.path.removeprefix("/bucket/").removesuffix(".jpg")
        there = (200, b"picture", {"ETag": '"e1"'})
        return {"ok": there, **said}.get(name, (200, b"<ListBucketResult/>"))

    serve(answer)
    (tmp_path / "list.txt").write_text("".join(f"s3://bucket/{name}.jpg\n" for name in ("ok", *said)))
    found = {image.key[12:-4]: (image.etag, image.size) for image in find_images(tmp_path / "list.txt", RunSettings())}
    assert found == {"ok": ("e1", 7), "gone": ("", 0), "shut": ("", 0), "bad": ("", 0)}


@pytest.mark.parametrize(
    "answer, reason",
    [
        ((500, error(b"InternalError")), "the store cannot give it (InternalError)"),
        ((200, b"pict", {"ETag": '"e1"', "Content-Length": "7"}), "the store cannot give it (ResponseStreamingError)"),
        ((200, b"picture", {"ETag": '"e1"', "x-amz-checksum-crc32": "AAAAAA=="}),
         "the store cannot give it (FlexibleChecksumError)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("listing", [(200, b"<ListBucketResult/>"), (403, error(b"AccessDenied"))])
def test_a_damaged_object_is_a_reason_where_its_store_answers(serve, pauses, answer, reason, listing):
    serve(lambda request: answer if request.path.startswith("/bucket/a.jpg") else listing)
    assert read_listed("s3://bucket/a.jpg", "e1", 7) == (None, reason) and reason.startswith(TRY_AGAIN)
    assert len(pauses) == WORKING - 1


def test_a_store_that_stays_away_ends_the_work(serve, pauses):
    asked = []

    def answer(request):
        asked.append(request.path)
        return 503, error(b"SlowDown")

    serve(answer)
    with pytest.raises(UserError, match=r"s3://bucket/a.jpg cannot be read: .*busy or broken \(SlowDown\)") as found:
        read_listed("s3://bucket/a.jpg", "e1", 7)
    assert found.value.exit_code == 1 and asked[:WORKING] == ["/bucket/a.jpg"] * WORKING
    assert len(asked) == WORKING + ASKING  # at last, whether it answers at all
    assert 300 < sum(pauses) < 900 and max(pauses) <= 30  # about ten minutes
    asked.clear()
    with pytest.raises(UserError, match="busy or broken") as found:
        Folder("s3://bucket/out").put("a", b"1")
    assert found.value.exit_code == 1 and len(asked) == WORKING


def test_a_store_that_hangs_is_not_waited_for_much_longer(monkeypatch, pauses):
    now, asked = [0.0], []

    def hang():
        asked.append(1)
        now[0] += 50
        raise ConnectTimeoutError(endpoint_url="http://s3.example.org")

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(ConnectTimeoutError):
        patiently(hang)
    assert len(asked) * 50 == PATIENCE


def test_what_is_amiss_with_the_variables_is_said(serve, monkeypatch, pauses):
    serve(lambda request: (403, error(b"SignatureDoesNotMatch")))
    folder = Folder("s3://bucket/out")
    for ask in (lambda: folder.get("a"), lambda: folder.create("a", b""), lambda: folder.names("")):
        with pytest.raises(UserError, match=r"access is denied \(SignatureDoesNotMatch\); check") as found:
            ask()
        assert found.value.exit_code == 2 and "secret" not in str(found.value)
    serve(lambda request: (404, error(b"NoSuchBucket")))
    for ask in (lambda: folder.put("a", b""), lambda: folder.names(""), lambda: folder.get("a")):
        with pytest.raises(UserError, match=r"s3://bucket/out/a? ?cannot be .*: there is no such bucket") as found:
            ask()
        assert found.value.exit_code == 2
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3_client.cache_clear()
    for ask in (lambda: folder.get("a"), lambda: read_listed("s3://bucket/a", "e", 1)):
        with pytest.raises(UserError, match="there are no credentials; set AWS_ACCESS_KEY_ID") as found:
            ask()
        assert found.value.exit_code == 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no address")
    s3_client.cache_clear()
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL is no address") as found:
        folder.get("a")
    assert not pauses


# --- folders that are written to


def test_a_local_folder_is_made_when_it_is_written_to(tmp_path):
    folder = Folder(tmp_path / "new" / "er")
    assert folder.get("0001/a") is None and folder.names("0001/") == [] and not (tmp_path / "new").exists()
    folder.put("0001/part-b", b"b")
    folder.put("0001/part-a", b"a")
    folder.put("0001/part-a", b"aa")
    folder.put("0001/other", b"")
    folder.put("0001/deep/part-c", b"c")
    assert folder.get("0001/part-a") == b"aa" and folder.get("0001/other") == b""
    assert folder.names("0001/part-") == ["0001/part-a", "0001/part-b"]
    assert folder.names("0001/") == ["0001/other", "0001/part-a", "0001/part-b"] and folder.names("") == []
    folder.delete("0001/part-b")
    folder.delete("0001/part-b")
    assert folder.names("0001/part-") == ["0001/part-a"]
    same = pickle.loads(pickle.dumps(Folder((tmp_path / "new" / "er").as_uri())))
    assert same.uri == folder.uri == str(tmp_path / "new" / "er") and same.get("0001/part-a") == b"aa"
    assert same.place("0001/part-a") == str(tmp_path / "new" / "er" / "0001" / "part-a")
    assert Folder("s3://bucket/out/").place("a/b") == "s3://bucket/out/a/b" and Folder("s3://bucket").uri == "s3://bucket"


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    folder.put("a", b"old")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (folder.put, folder.create):
        with pytest.raises(UserError, match=f"{tmp_path}/a cannot be written: .*No space left") as found:
            write("a", b"new")
        assert found.value.exit_code == 1 and "\n" not in str(found.value)
    assert folder.get("a") == b"old" and os.listdir(tmp_path) == ["a"]
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    with pytest.raises(UserError, match="No space left"):
        folder.create("b", b"new")
    assert os.listdir(tmp_path) == ["a"]


RACE = """
import sys, time
from pathlib import Path
from pipelines.storage import Folder

folder, me = Folder(sys.argv[1]), sys.argv[2].encode() * 100_000
folder.put(f"ready/{sys.argv[2]}", b"")
while len(folder.names("ready/")) < 8:
    time.sleep(0.01)
print(sum(folder.create(f"race/{number:02d}", me) for number in range(40)))
"""


def test_of_eight_processes_that_create_a_file_one_does(tmp_path):
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    racers = [subprocess.Popen([*command, str(at)], stdout=subprocess.PIPE, text=True) for at in range(8)]
    won = [int(racer.communicate(timeout=120)[0]) for racer in racers]
    folder = Folder(tmp_path)
    written = [folder.get(name) for name in folder.names("race/")]
    assert sum(won) == len(written) == 40 == len(os.listdir(tmp_path / "race"))
    assert [sum(data == str(at).encode() * 100_000 for data in written) for at in range(8)] == won


def test_where_files_have_but_one_name_one_of_many_creates_it(tmp_path, monkeypatch):
    def no_links(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    folder = Folder(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for number in range(10):
            won = list(pool.map(lambda me, name: folder.create(name, b"%d" % me), range(8), [str(number)] * 8))
            assert sum(won) == 1 and folder.get(str(number)) == b"%d" % won.index(True)
    assert len(os.listdir(tmp_path)) == 10


@pytest.mark.parametrize("status, there", [(501, False), (501, True), (400, False), (400, True)])
def test_a_store_that_knows_no_condition_is_looked_into_first(serve, status, there):
    asked = []

    def answer(request):
        conditional = "If-None-Match" in request.headers
        asked.append((request.command, conditional))
        if request.command == "HEAD":
            return (200 if there else 404), b""
        return (status, error(b"NotImplemented")) if conditional else (200, b"", {"ETag": '"e"'})

    serve(answer)
    assert Folder("s3://bucket/out").create("a", b"1") is not there
    assert asked == [("PUT", True), ("HEAD", False), ("PUT", False)][: 2 if there else 3]


def test_a_store_that_knows_the_condition_decides(serve, pauses):
    answers = [(412, error(b"PreconditionFailed"))]
    serve(lambda request: answers.pop(0))
    folder = Folder("s3://bucket/out")
    assert folder.create("a", b"1") is False
    answers += [(409, error(b"ConditionalRequestConflict")), (200, b"", {"ETag": '"e"'})]
    assert folder.create("a", b"1") is True and not answers
    answers += [(503, error(b"SlowDown")), (412, error(b"PreconditionFailed"))]  # the first one's answer was lost
    assert folder.create("a", b"1") is False and not answers
    answers += [(409, error(b"ConditionalRequestConflict"))] * WORKING
    assert folder.create("a", b"1") is False and not answers

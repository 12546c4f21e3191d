"""Local paths and s3:// URIs, and what is said when they cannot be opened."""

import http.server
import os
import threading
from contextlib import ExitStack, contextmanager

import pyarrow.fs as pafs
import pytest

from pipelines import storage
from pipelines.settings import UserError
from pipelines.storage import ASKING, _s3, fetch, filesystem, from_task, join, kind, list_files, read_file


@contextmanager
def s3_server(answer):
    """A server on loopback; answer(path) gives (status, body)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answer(self.path)
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

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

        yield start
        _s3.cache_clear()


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
    serve(lambda path: (403, error(b"AccessDenied")) if path.startswith("/closed") else (404, error(b"NoSuchBucket")))
    with pytest.raises(UserError, match="access is denied") as found:
        filesystem("s3://closed/images")
    assert found.value.exit_code == 2
    with pytest.raises(UserError, match="There is no bucket or folder s3://missing/images"):
        filesystem("s3://missing/images")


def test_a_store_that_is_busy_for_a_while_is_waited_for(serve):
    asked = []

    def answer(path):
        asked.append(path)
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
    text = "ray::map() (pid=1)\n  File x\npipelines.settings.UserError: s3://b/a.jpg cannot be read: it is away.\n"
    error = from_task(RuntimeError(text))
    assert str(error) == "s3://b/a.jpg cannot be read: it is away; what was done is kept, so run it again."
    assert from_task(RuntimeError("KeyError: 1")) is None


def test_a_file_that_cannot_be_read_has_a_reason(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    assert read_file(tmp_path / "a") == (b"12345", None)
    assert read_file(tmp_path / "a", 4) == (None, "the file is larger than 0 MiB")
    assert read_file(tmp_path / "none") == (None, "there is no such file")
    assert read_file(tmp_path / "pipe")[1] == read_file(tmp_path)[1] == "it is not a file"

"""What it costs to list a bucket and put its images in order: seconds and peak memory, as the bucket grows.

\b
    python benchmarks/listing.py
    python benchmarks/listing.py --keys 1000000 --keys 10000000

The keys are made up (20 folders of images) and served as ListObjectsV2 by a server in a process of its own, on the
same machine, which writes an answer in a few milliseconds. Each size runs in a fresh process; its memory is what Linux
says the process held at most.
"""
from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs, urlsplit

import click

FOLDERS = 20
PAGE = 1000  # keys in an answer, as of S3
TOP = '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>'
ENTRY = (
    "<Contents><Key>{key}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
    "<ETag>&quot;{etag}&quot;</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
)


def key(number: int, keys: int) -> str:
    """The number-th key in order."""
    return f"camera-{number * FOLDERS // keys:03d}/2026/01/02/{number:010d}.jpg"


def serve(keys: int) -> None:
    """Answer as a bucket of so many keys would, until killed; prints the port."""

    class Bucket(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def do_GET(self):
            asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            prefix, entries, more = asked.get("prefix", ""), [], ""
            if "delimiter" in asked and not prefix:
                folders = [key(-(-n * keys // FOLDERS), keys).partition("/")[0] for n in range(FOLDERS)]
                entries = [f"<CommonPrefixes><Prefix>{folder}/</Prefix></CommonPrefixes>" for folder in folders]
            else:
                folder = int(prefix[7:10] or 0)
                first = int(asked.get("continuation-token", -(-folder * keys // FOLDERS)))
                end = -(-(folder + 1) * keys // FOLDERS) if prefix else keys
                for n in range(first, min(first + PAGE, end)):
                    etag = hashlib.md5(b"%d" % n, usedforsecurity=False).hexdigest()
                    entries.append(ENTRY.format(key=key(n, keys), etag=etag, size=100_000 + n))
                if first + PAGE < end:
                    more = f"<NextContinuationToken>{first + PAGE}</NextContinuationToken>"
            truncated = f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>"
            body = f"{TOP}{truncated}{more}{''.join(entries)}</ListBucketResult>".encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    print(server.server_port, flush=True)
    server.serve_forever()


def measure(keys: int) -> dict[str, Any]:
    """List the bucket that AWS_ENDPOINT_URL serves, and read the listing back, in this process."""
    from pipelines.listing import Listing, find_images
    from pipelines.settings import RunSettings

    before = peak()
    with Listing() as listing:
        began = time.perf_counter()
        listed = listing.add(find_images("s3://bucket", RunSettings()), "s3://bucket")
        seconds, began = time.perf_counter() - began, time.perf_counter()
        last, read = "", 0
        for image, _, _ in listing.images():
            if image.key <= last:
                raise RuntimeError(f"{image.key} comes after {last}")
            last, read = image.key, read + 1
        back = time.perf_counter() - began
    if not listed == read == keys:
        raise RuntimeError(f"of {keys} keys {listed} were listed and {read} read back")
    return {"keys": keys, "list_seconds": seconds, "read_seconds": back, "before_MiB": before, "peak_MiB": peak()}


def peak() -> float:
    """MiB that this process held at most. (getrusage would count what started it, too.)"""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 2**10


@click.command(help=__doc__)
@click.option("--keys", "sizes", type=click.IntRange(FOLDERS), multiple=True, default=[100_000, 1_000_000],
              show_default=True)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
@click.option("--side", hidden=True)
@click.option("--folder", type=Path, hidden=True)
def main(sizes, as_json, side, folder):
    if side == "serve":
        serve(sizes[0])
    if side == "list":
        (folder / "result.json").write_text(json.dumps(measure(sizes[0])))
        return
    from common import machine, print_table

    found = []
    for keys in sizes:
        click.echo(f"{keys:,} keys", err=True)
        again = [sys.executable, __file__, "--keys", str(keys)]
        server = subprocess.Popen([*again, "--side", "serve"], stdout=subprocess.PIPE)
        try:
            own = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}"}
            own |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
            with TemporaryDirectory() as place:
                command = [*again, "--side", "list", "--folder", place]
                subprocess.run(command, env=os.environ | own, check=True, stdout=sys.stderr)
                found.append(json.loads((Path(place) / "result.json").read_text()))
        finally:
            server.kill()
            server.wait()
    growth = found[-1]["peak_MiB"] - found[0]["peak_MiB"]
    if as_json:
        click.echo(json.dumps({"machine": machine("cpu"), "runs": found, "growth_MiB": growth}))
        return
    rows = [
        [f"{r['keys']:,}", f"{r['list_seconds']:.1f}", f"{r['keys'] / r['list_seconds']:,.0f}",
         f"{r['read_seconds']:.1f}", f"{r['before_MiB']:.0f}", f"{r['peak_MiB']:.0f}"]
        for r in found
    ]  # fmt: skip
    columns = ["keys", "s, listed", "keys/s", "s, read back in order", "MiB before", "MiB at most"]
    notes = [f"From the first to the last {growth:+.0f} MiB."]
    print_table(f"A bucket into a listing ({machine('cpu')})", columns, rows, notes)


if __name__ == "__main__":
    main()

"""The part of Ray's Jobs API that our client uses, on loopback, for tests that need no cluster."""
from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

from aiohttp import web


class JobsApi:
    """Start with `with JobsApi() as api`; api.address is what `--address` must be.

    Submitted jobs are in `jobs`, PENDING until a test ends them; every request's path, headers and body are in `asked`.
    token: what it asks for. refusals: answers to the next submissions instead of taking them. drops: how many readers
    of a log are cut off after the first piece. ends: whether what is submitted is done at once.
    """

    def __init__(self, token: str | None = None, ends: bool = False):
        self.token, self.ends = token, ends
        self.jobs: dict[str, dict[str, Any]] = {}
        self.packages: dict[str, bytes] = {}
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.refusals: list[str] = []
        self.drops = 0
        self.together: threading.Barrier | None = None  # where submissions wait for one another

    def add(self, job_id: str, status: str = "RUNNING", log: str = "", code: int | None = None, **more: Any) -> None:
        self.jobs[job_id] = {
            "type": "SUBMISSION", "submission_id": job_id, "entrypoint": "", "metadata": {"detr_command": "train"},
            "start_time": 1_700_000_000_000 + len(self.jobs), "status": status, "log": log, "driver_exit_code": code,
            **more,
        }  # fmt: skip

    def end(self, job_id: str, status: str, log: str = "", code: int | None = None) -> None:
        self.jobs[job_id] |= {"status": status, "driver_exit_code": code, "end_time": 1_700_000_100_000}
        self.jobs[job_id]["log"] += log

    def __enter__(self) -> JobsApi:
        app = web.Application(middlewares=[self._look], client_max_size=2**26)
        app.add_routes([
            web.get("/api/version", self._version), web.get("/api/packages/{p}/{name}", self._package),
            web.put("/api/packages/{p}/{name}", self._package), web.post("/api/jobs/", self._submit),
            web.get("/api/jobs/", self._list), web.get("/api/jobs/{id}", self._job),
            web.get("/api/jobs/{id}/logs", self._logs), web.get("/api/jobs/{id}/logs/tail", self._tail),
            web.post("/api/jobs/{id}/stop", self._stop),
        ])  # fmt: skip
        self.loop = asyncio.new_event_loop()
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

        async def start() -> int:
            await self.runner.setup()
            site = web.TCPSite(self.runner, "127.0.0.1", 0)
            await site.start()
            return self.runner.addresses[0][1]

        self.address = f"http://127.0.0.1:{asyncio.run_coroutine_threadsafe(start(), self.loop).result()}"
        return self

    def __exit__(self, *error) -> None:
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    @web.middleware
    async def _look(self, request: web.Request, handler) -> web.StreamResponse:
        self.asked.append((request.path, dict(request.headers), await request.read()))
        given = request.headers.get("Authorization", "")
        if self.token and given != f"Bearer {self.token}":
            return web.Response(status=403 if given else 401, text="no")
        return await handler(request)

    async def _version(self, request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})

    async def _package(self, request) -> web.Response:
        name = request.match_info["name"]
        if request.method == "PUT":
            self.packages[name] = await request.read()
        return web.Response(status=200 if name in self.packages else 404)

    async def _submit(self, request) -> web.Response:
        asked = await request.json()
        if self.together:
            await asyncio.to_thread(self.together.wait, 10)
        if self.refusals:
            return web.Response(status=500, text=self.refusals.pop(0))
        job_id = asked["submission_id"]
        if job_id in self.jobs:
            return web.Response(status=500, text=f"Traceback\nValueError: Job {job_id} already exists.")
        self.add(job_id, "PENDING", entrypoint=asked["entrypoint"], metadata=asked["metadata"],
                 runtime_env=asked["runtime_env"])  # fmt: skip
        if self.ends:
            self.end(job_id, "SUCCEEDED", '{"exit_code": 0}\n', 0)
        return web.json_response({"job_id": job_id, "submission_id": job_id})

    def _found(self, request) -> dict[str, Any]:
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            raise web.HTTPNotFound(text=f"Job {request.match_info['id']} does not exist")
        return job

    async def _list(self, request) -> web.Response:
        return web.json_response([{**job, "log": None} for job in self.jobs.values()])

    async def _job(self, request) -> web.Response:
        return web.json_response(self._found(request))

    async def _logs(self, request) -> web.Response:
        return web.json_response({"logs": self._found(request)["log"]})

    async def _stop(self, request) -> web.Response:
        self._found(request)
        self.end(request.match_info["id"], "STOPPED")
        return web.json_response({"stopped": True})

    async def _tail(self, request) -> web.WebSocketResponse:
        job, sent = self._found(request), 0
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        while True:
            over = job["status"] in ("SUCCEEDED", "FAILED", "STOPPED")
            if piece := job["log"][sent : sent + 40]:
                await socket.send_str(piece)
                sent += len(piece)
                if self.drops:
                    self.drops -= 1
                    request.transport.abort()
                    return socket
            elif over:
                return socket
            await asyncio.sleep(0 if piece else 0.02)


def submissions(api: JobsApi) -> list[dict[str, Any]]:
    """What was asked to be run, in order."""
    return [json.loads(body) for path, _, body in api.asked if path == "/api/jobs/" and body]

"""What the page answers, on Starlette: the files in static/, JSON, and what is new of the run."""

import asyncio
import json
import secrets
import shlex
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from federated.errors import FederationError
from plumbing.page.state import (
    RunState,
    device_curves,
    finite,
    read_config,
    read_rounds,
    read_run,
    shown_config,
)
from plumbing.report import number
from plumbing.security.admissions import TOKEN_SECONDS, TOKEN_USES
from plumbing.security.gate import Gate

STATIC = Path(__file__).resolve().parent / "static"
STATIC_FILES = ("page.css", "page.js", "charts.js", "icon.svg")
RUN_FILES = {  # that can be fetched, and how they are shown
    "report.png": "image/png",
    "model.safetensors": "application/octet-stream",
    "config.json": "application/json",
    "metrics.jsonl": "text/plain",
    "events.jsonl": "text/plain",
}
TICK_SECONDS = 0.5  # from one look at what is new to the next
BEAT_SECONDS = 15.0  # of silence, then a comment shows that the connection stands
MAX_STREAMS = 64  # browser tabs that are kept up to date
MAX_BODY = 10_000
COMPARED = ("model", "strategy", "rounds")


class App:
    """The page's answers.

    Args:
        runs: the directory with the runs.
        live: the run that goes on, with its directory; None where past runs are shown.
        gate: of a server with --secure.
    """

    def __init__(
        self,
        runs: Path,
        live: RunState | None = None,
        directory: Path | None = None,
        gate: Gate | None = None,
    ) -> None:
        self.runs = runs
        self.live = live
        self.directory = directory
        self.gate = gate
        self.process = secrets.token_hex(4)  # numbers of another process's versions mean nothing
        self.streams = 0
        self.closing = False
        self.starlette = Starlette(
            routes=[
                Route("/", self._file("index.html")),
                *(Route(f"/{name}", self._file(name)) for name in STATIC_FILES),
                Route("/api/live", self.news),
                Route("/api/runs", self.list_runs),
                Route("/api/runs/{run}", self.run),
                Route("/api/runs/{run}/devices/{cid}", self.device),
                Route("/runs/{run}/{file}", self.run_file),
                Route("/api/owner", self.owner),
                Route("/api/owner/token", self.token, methods=["POST"]),
                Route("/api/owner/revoke", self.revoke, methods=["POST"]),
            ],
            exception_handlers={HTTPException: _problem},
        )

    def _file(self, name: str) -> Callable[[Request], Response]:
        return lambda request: FileResponse(STATIC / name)

    # --- The run that goes on ---

    async def news(self, request: Request) -> Response:
        """Stream what is new: all of it at first, or after the last that the browser has."""
        if not self.live:
            raise HTTPException(404, "no run goes on here")
        if self.streams >= MAX_STREAMS:
            raise HTTPException(503, f"{MAX_STREAMS} pages are open already")
        process, _, version = request.headers.get("last-event-id", "").partition("-")
        known = process == self.process and version.isascii() and version.isdigit()
        events = self._news(self.live, int(version) if known else 0)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _news(self, live: RunState, version: int) -> AsyncIterator[bytes]:
        """Yield server-sent events.

        A browser that reads slowly gets fewer and larger ones: nothing waits for it but this.
        """
        self.streams += 1
        try:
            silence = 0.0
            yield b"retry: 1000\n\n"
            while True:
                if news := live.since(version):
                    version, silence = news["version"], 0.0
                    data = json.dumps(news, separators=(",", ":"), allow_nan=False)
                    yield f"id: {self.process}-{version}\ndata: {data}\n\n".encode()
                elif silence >= BEAT_SECONDS:
                    silence = 0.0
                    yield b": still here\n\n"
                if self.closing:
                    return
                silence += TICK_SECONDS
                await asyncio.sleep(TICK_SECONDS)
        finally:
            self.streams -= 1

    # --- All runs ---

    def list_runs(self, request: Request) -> Response:
        """Return a line for each run, the newest first."""
        found = [path for path in self.runs.glob("*/") if (path / "config.json").exists()]
        if self.directory and self.directory not in found:
            found.append(self.directory)
        lines = [self._line(path) for path in found]
        lines.sort(key=lambda line: line["started"], reverse=True)
        owner = self.gate is not None
        return JSONResponse({"runs": lines, "live": self.live is not None, "owner": owner})

    def _line(self, path: Path) -> dict[str, Any]:
        config, rounds = shown_config(read_config(path)), read_rounds(path)
        accuracy = [[row["server_round"], finite(number(row, "accuracy"))] for row in rounds]
        return {
            "name": path.name,
            "started": (path / "config.json").stat().st_ctime if config else 0,
            "live": path == self.directory,
            **{name: config.get(name) for name in COMPARED},
            "finished": len(rounds),
            "accuracy": accuracy,
            "loss": [[row["server_round"], finite(number(row, "loss"))] for row in rounds],
            "devices": len({d["name"] for row in rounds for d in row.get("devices", [])}),
            "config": config,
            "files": [name for name in RUN_FILES if (path / name).is_file()],
        }

    def run(self, request: Request) -> Response:
        return JSONResponse(read_run(self._directory(request)).since(0))

    def device(self, request: Request) -> Response:
        rounds = read_rounds(self._directory(request))
        return JSONResponse({"rounds": device_curves(rounds, request.path_params["cid"])})

    def run_file(self, request: Request) -> Response:
        directory, name = self._directory(request), request.path_params["file"]
        path = directory / name
        if name not in RUN_FILES or not path.is_file():
            raise HTTPException(404, "there is no such file")
        kind = "inline" if name == "report.png" else "attachment"
        return FileResponse(
            path, media_type=RUN_FILES[name], filename=f"{directory.name}-{name}",
            content_disposition_type=kind,
        )  # fmt: skip

    def _directory(self, request: Request) -> Path:
        """Return the directory of the run that is asked for."""
        name = request.path_params["run"]
        if self.directory and name == self.directory.name:
            return self.directory
        if name in {path.name for path in self.runs.glob("*/")}:
            return self.runs / name
        raise HTTPException(404, "there is no such run")

    # --- The owner's part; the door lets in nobody else ---

    def _gate(self) -> Gate:
        if not self.gate:
            raise HTTPException(404, "anyone can join this server: it runs without --secure")
        return self.gate

    def owner(self, request: Request) -> Response:
        """Return the devices that were admitted."""
        devices = self._gate().admissions.all()
        return JSONResponse(
            {
                "devices": [
                    {
                        "cid": device.cid,
                        "admitted": device.admitted,
                        "how": device.how,
                        "seen": device.last_seen,
                        "address": device.last_address or "",
                        "key": device.key_hash[:16],
                        "revoked": device.revoked,
                    }
                    for device in devices
                ]
            }
        )

    async def token(self, request: Request) -> Response:
        """Make a token, and return the commands that use it."""
        gate = self._gate()
        made = await run_in_threadpool(gate.admissions.make_token, gate.authority.hash)
        address = self.live.address if self.live else "SERVER_ADDRESS"
        model = shlex.quote(str(self.live.config.get("model"))) if self.live else "Net"
        common = f"--server_address={address} --cid=0 --model={model} --join={made}"
        commands = {
            "Raspberry Pi": f"./run_pi.sh {common}",
            "Jetson": f"./run_jetson.sh {common}",
            "without Docker": f"python client.py {common}",
        }
        return JSONResponse(
            {"commands": commands, "hours": TOKEN_SECONDS / 3600, "uses": TOKEN_USES}
        )

    async def revoke(self, request: Request) -> Response:
        """Take a device's admission back; the fleet cuts it off within a second."""
        gate = self._gate()
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise HTTPException(413, "a request this large is none of the page's")
        try:
            cid = json.loads(body)["cid"]
            if not isinstance(cid, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise HTTPException(400, "which device is to be revoked?") from None
        try:
            await run_in_threadpool(partial(gate.admissions.revoke, cid))
        except FederationError as error:
            raise HTTPException(409, str(error)) from None
        return JSONResponse({"revoked": cid})


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"problem": error.detail}, error.status_code)

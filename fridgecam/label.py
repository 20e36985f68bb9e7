"""The page to label photographs with: one photograph, three suggestions, one key each.

It moves files from inbox/ to photos/<class>/ and keeps no data base: moving them by hand does
the same. Who may open it is in door.py.
"""

import glob
import json
import mimetypes
import secrets
import socket
import ssl
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from federated.errors import FederationError
from fridgecam import door
from fridgecam.home import PERSONAL, Home, Looker
from fridgecam.look import home_of, parser_for
from plumbing import cli
from plumbing.files import write_whole
from plumbing.page.door import Door
from plumbing.photos import is_photo
from plumbing.publish import CARD

HERE = Path(__file__).resolve().parent
POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MAX_BODY = 4000  # bytes of a request; a file's name has at most 255


class Labels:
    """What is there to label, and what was done so far; undone step by step."""

    def __init__(self, home: Home, looker: Looker | None = None) -> None:
        self.home = home
        self.given = looker
        self.looker, self.stamp = looker or Looker(home), self._stamp()
        self.skipped: set[str] = set()
        self.done: list[tuple[str, str, Path | None]] = []  # what, the name in inbox/, where now

    @property
    def classes(self) -> list[str]:
        return self.looker.card.classes

    def refresh(self) -> None:
        """Take the newest model: `watch` may have fetched one since the last photograph."""
        if not self.given and self._stamp() != self.stamp:
            self.stamp = self._stamp()
            self.looker = Looker(self.home)

    def _stamp(self) -> list[int]:
        files = [self.home.model / name for name in (CARD, PERSONAL)]
        return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]

    def waiting(self) -> list[Path]:
        """Return the photographs that are still to be labelled, the oldest first."""
        excluded = self.home.excluded()
        found = [p for p in self.home.inbox.glob("*") if is_photo(p) and not excluded.has(p)]
        rest = [p for p in found if p.name not in self.skipped]
        return sorted(rest, key=lambda path: (path.stat().st_mtime, path.name))

    def label(self, name: str, class_name: str) -> None:
        """Move a photograph to its class."""
        if class_name not in self.classes:
            raise FederationError(f"the model has no class '{class_name}'")
        source = self._path(name)
        folder = self.home.photos / class_name
        folder.mkdir(parents=True, exist_ok=True)
        target = free_path(folder / name)
        source.rename(target)
        self.done.append(("label", name, target))

    def exclude(self, name: str) -> None:
        """Keep a photograph out, by a line in exclude.txt; the file stays where it is."""
        self._path(name)
        self._write_exclude([*self._excluded_lines(), glob.escape(name)])
        self.done.append(("exclude", name, None))

    def skip(self, name: str) -> None:
        """Show a photograph no more until the page is started again."""
        self._path(name)
        self.skipped.add(name)
        self.done.append(("skip", name, None))

    def undo(self) -> None:
        """Take the last step back."""
        if not self.done:
            return
        what, name, where = self.done.pop()
        if what == "skip":
            self.skipped.discard(name)
        elif what == "exclude":
            lines = self._excluded_lines()
            if glob.escape(name) in lines:
                lines.remove(glob.escape(name))
            self._write_exclude(lines)
        elif where and where.exists():
            where.rename(free_path(self.home.inbox / name))
        else:
            raise FederationError(f"'{name}' was moved by hand since; it stays where it is")

    def read(self, name: str) -> bytes:
        """Return the bytes of a photograph in the inbox."""
        return self._path(name).read_bytes()

    def _path(self, name: str) -> Path:
        if Path(name).name != name or not is_photo(path := self.home.inbox / name):
            raise FederationError(f"'{name}' is no photograph's name")
        if not path.is_file():
            raise FederationError(f"'{name}' is not in the inbox any more")
        return path

    def _excluded_lines(self) -> list[str]:
        file = self.home.exclude
        return file.read_text().splitlines() if file.exists() else []

    def _write_exclude(self, lines: list[str]) -> None:
        write_whole(self.home.exclude, "".join(f"{line}\n" for line in lines).encode())


def free_path(path: Path) -> Path:
    """Return a path where no file is: cameras begin their numbers again."""
    while path.exists():
        path = path.with_name(f"{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    return path


class Page:
    """What the page answers; see `make_page` for who gets an answer."""

    def __init__(self, labels: Labels, code: door.Code | None = None) -> None:
        self.labels = labels
        self.code = code
        self.door: Door | None = None
        routes = [
            Route("/", lambda request: html("label.html")),
            Route("/state", self.state),
            Route("/photo/{name}", self.photo),
            Route("/do", self.do, methods=["POST"]),
        ]
        if code:
            routes.append(Route(door.ENTRANCE, lambda request: html("code.html")))
            routes.append(Route(door.ENTRANCE, self.enter, methods=["POST"]))
        self.app = Starlette(routes=routes)

    async def state(self, request: Request) -> Response:
        return await self._answer(lambda: None)

    async def photo(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            data = await run_in_threadpool(self.labels.read, name)
        except (FederationError, OSError):  # it was moved meanwhile
            return Response(status_code=404)
        return Response(data, media_type=mimetypes.guess_type(name)[0])

    async def do(self, request: Request) -> Response:
        """Take a step: label, exclude or skip a photograph, or undo the last step."""
        # The door has looked at Origin; a form of another site cannot send this header either.
        if request.headers.get("x-fridgecam") != "1":
            return JSONResponse({"problem": "not from this page"}, 403)
        labels, body = self.labels, await body_of(request)
        name, class_name = str(body.get("name", "")), str(body.get("class", ""))
        steps: dict[object, Callable[[], None]] = {
            "label": lambda: labels.label(name, class_name),
            "exclude": lambda: labels.exclude(name),
            "skip": lambda: labels.skip(name),
            "undo": labels.undo,
        }
        what = body.get("what")
        if not isinstance(what, str) or what not in steps:
            return JSONResponse({"problem": "no such step"}, 400)
        return await self._answer(steps[what])

    async def _answer(self, step: Callable[[], None]) -> Response:
        def take() -> dict[str, object]:
            step()
            return show(self.labels)

        try:
            return JSONResponse(await run_in_threadpool(take))
        except FederationError as error:
            return JSONResponse({"problem": str(error)}, 409)
        except OSError as error:  # a full disk, or a folder of another user
            problem = f"'{error.filename}' cannot be changed: {error.strerror}"
            return JSONResponse({"problem": problem}, 409)

    async def enter(self, request: Request) -> Response:
        """Let a browser in that has the code."""
        assert self.code and self.door
        if self.code.take(str((await body_of(request)).get("code", ""))):
            return self.door.let_in(JSONResponse({}))
        problem = "too many wrong codes; start the page again" if self.code.spent else "wrong code"
        return JSONResponse({"problem": problem}, 403)


def html(name: str) -> Response:
    """Return one of the pages in this folder; only its own scripts run."""
    nonce = secrets.token_urlsafe(16)
    text = (HERE / name).read_text().replace("NONCE", nonce)
    headers = {"Content-Security-Policy": POLICY.format(nonce)}
    return Response(text, media_type="text/html", headers=headers)


async def body_of(request: Request) -> dict[str, object]:
    """Return the object in a request; {} where there is none, or a large one."""
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY:
            return {}
    try:
        body = json.loads(data)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def make_page(labels: Labels, port: int, names: list[str], code: door.Code | None = None) -> Door:
    """Return the page's web application.

    Args:
        names: by which it may be called; another site whose name points here gets nothing.
        code: what lets a browser in; without it, who uses this machine is in.
    """
    page, lan = Page(labels, code), code is not None
    entrance = door.ENTRANCE if lan else ""
    page.door = Door(page.app, names, port, loopback=not lan, tls=lan, entrance=entrance)
    return page.door


def show(labels: Labels) -> dict[str, object]:
    """Return what the page shows next."""
    labels.refresh()
    waiting = labels.waiting()
    while waiting:
        try:
            seen = labels.looker.look(waiting[0])
            break
        except FederationError:  # not a photograph after all
            labels.skipped.add(waiting.pop(0).name)
    excluded = labels.home.excluded()
    shown = [name for name in labels.classes if not excluded.has(Path(name), name)]
    return {
        "name": waiting[0].name if waiting else "",
        "suggestions": [asdict(s) for s in seen] if waiting else [],
        "left": len(waiting),
        "done": len(labels.done),
        "classes": shown,
    }


def label(argv: list[str]) -> None:
    """Open a page to label the photographs in inbox/ with, by keys."""
    parser = parser_for("label", label.__doc__ or "")
    parser.flag("port", "where to listen", 8082, metavar="PORT")
    parser.switch("lan", "also for the local network: with TLS, and a code for each browser")
    args = parser.parse_args(argv)
    with cli.ready("fridgecam label"):
        home = home_of(args)
        labels = Labels(home)
        with door.listen(door.ALL if args.lan else "127.0.0.1", args.port) as listener:
            port = listener.getsockname()[1]
            if args.lan:
                serve_lan(labels, home, listener, port)
            else:
                print(f"label at http://127.0.0.1:{port}/ (Ctrl-C ends)")
                serve(make_page(labels, port, list(door.LOCAL)), listener)


def serve_lan(labels: Labels, home: Home, listener: socket.socket, port: int) -> None:
    """Serve the page to the local network."""
    names = door.lan_names()
    context, fingerprint = door.own_certificate(home.keys, names)
    print(f"label at {door.lan_address(port)} (Ctrl-C ends)")
    print(f"the browser warns of this device's own certificate; its SHA-256 is\n{fingerprint}")
    serve(make_page(labels, port, names, door.Code()), listener, context)


def serve(page: Door, listener: socket.socket, context: ssl.SSLContext | None = None) -> None:
    config = uvicorn.Config(
        page, log_level="error", access_log=False, server_header=False, proxy_headers=False,
        lifespan="off", ws="none", limit_concurrency=50, timeout_graceful_shutdown=1,
    )  # fmt: skip
    config.load()
    if context:
        config.ssl = context
    uvicorn.Server(config).run([listener])

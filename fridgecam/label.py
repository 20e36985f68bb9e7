"""The page to label photographs with: one photograph, three suggestions, one key each.

It moves files from inbox/ to photos/<class>/ and keeps no data base: moving them by hand does
the same. Only this machine can open it.
"""

import glob
import mimetypes
import secrets
from dataclasses import asdict
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from federated.errors import FederationError
from fridgecam.home import Home, Looker
from fridgecam.look import home_of, parser_for
from plumbing import cli
from plumbing.files import write_whole
from plumbing.photos import is_photo

PAGE = Path(__file__).resolve().parent / "label.html"
LOCAL = ["127.0.0.1", "localhost"]
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'nonce-{}'; style-src 'nonce-{}'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Labels:
    """What is there to label, and what was done so far; undone step by step."""

    def __init__(self, home: Home, looker: Looker | None = None) -> None:
        self.home = home
        self.looker = looker or Looker(home)
        self.classes = self.looker.card.classes
        self.skipped: set[str] = set()
        self.done: list[tuple[str, str, Path | None]] = []  # what, the name in inbox/, where now

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
        target = folder / name
        if target.exists():  # cameras begin their numbers again
            target = folder / f"{source.stem}-{secrets.token_hex(4)}{source.suffix}"
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
            where.rename(self.home.inbox / name)

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


def make_app(labels: Labels) -> Starlette:
    """Return the page's web application."""

    async def page(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        headers = {name: text.replace("{}", nonce) for name, text in HEADERS.items()}
        text = PAGE.read_text().replace("NONCE", nonce)
        return Response(text, media_type="text/html", headers=headers)

    async def state(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(show, labels))

    async def photo(request: Request) -> Response:
        try:
            data = await run_in_threadpool(labels.read, request.path_params["name"])
        except (FederationError, OSError):  # it was moved meanwhile
            return Response(status_code=404)
        kind = mimetypes.guess_type(request.path_params["name"])[0]
        return Response(data, media_type=kind, headers={"Cache-Control": "no-store"})

    async def do(request: Request) -> Response:
        # A form of another site cannot send this header.
        if request.headers.get("x-fridgecam") != "1":
            return JSONResponse({"problem": "not from this page"}, 403)
        body = await request.json()
        steps = {"exclude": labels.exclude, "skip": labels.skip}
        try:
            if body["what"] == "label":
                labels.label(str(body["name"]), str(body["class"]))
            elif body["what"] == "undo":
                labels.undo()
            else:
                steps[body["what"]](str(body["name"]))
        except FederationError as error:
            return JSONResponse({"problem": str(error)}, 409)
        except (KeyError, TypeError):
            return JSONResponse({"problem": "no such step"}, 400)
        return JSONResponse(await run_in_threadpool(show, labels))

    routes = [
        Route("/", page),
        Route("/state", state),
        Route("/photo/{name}", photo),
        Route("/do", do, methods=["POST"]),
    ]
    # Another site whose name points here must not read photographs.
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL)
    return Starlette(routes=routes, middleware=[guard])


def show(labels: Labels) -> dict[str, object]:
    """Return what the page shows next."""
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
    """Open a page on this machine to label the photographs in inbox/ with, by keys."""
    parser = parser_for("label", label.__doc__ or "")
    parser.flag("port", "where to listen on 127.0.0.1", 8082, metavar="PORT")
    args = parser.parse_args(argv)
    with cli.ready("fridgecam label"):
        app = make_app(Labels(home_of(args)))
        print(f"label at http://127.0.0.1:{args.port}/ (Ctrl-C ends)")
        try:
            uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="error")
        except SystemExit:
            raise FederationError(f"port {args.port} is in use; choose another --port") from None

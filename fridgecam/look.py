"""Name what is in photographs; imports neither gRPC nor torch, for small boards."""

import argparse
from pathlib import Path

from federated.errors import FederationError
from fridgecam.home import Home, Looker, default_home
from plumbing import cli
from plumbing.photos import is_photo


def parser_for(command: str, text: str) -> cli.Parser:
    parser = cli.Parser(prog=f"run_fridgecam.sh {command}", description=text)
    parser.flag("home", "the fridge's folder (default: $FRIDGE_HOME or ~/fridge)", metavar="DIR")
    return parser


def home_of(args: argparse.Namespace) -> Home:
    return Home(Path(args.home) if args.home else default_home())


def look(argv: list[str]) -> None:
    """Name what is in photographs: the three likeliest, with how sure that is."""
    parser = parser_for("look", look.__doc__ or "")
    parser.add_argument("paths", nargs="+", metavar="PHOTO", help="photographs, or folders of them")
    args = parser.parse_args(argv)
    with cli.ready("fridgecam look"):
        home = home_of(args)
        looker = Looker(home)
        found = photos_in(args.paths)
        if not found:
            print(f"no photographs in {' '.join(args.paths)}")
        for path in found:
            if home.excluded().has(path):
                continue
            seen = "  ".join(f"{s.name} {100 * s.confidence:.0f} %" for s in looker.look(path))
            print(f"{path.name}: {seen}")


def photos_in(paths: list[str]) -> list[Path]:
    """Return the photographs at some paths; FederationError for a path that is none."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if is_photo(p))
        elif path.is_file():
            found.append(path)
        else:
            raise FederationError(f"there is no photograph or folder '{path}'")
    return found

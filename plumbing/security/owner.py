"""Who may take part, for the owner of a server with --secure.

python server.py devices                     list them: since when, last seen, from where
python server.py devices token               a new token, also while the server runs
python server.py devices revoke 3            cut device 3 off, and do not let it in again
python server.py devices revoke -- -h        a device with such a name, on an older list
python server.py devices prune --days 90     remove the revoked, and those not seen for 90 days
python server.py devices admit 7 8 --out DIR make their key files, for SD cards:
                                             client.py --join=FILE, or ./run_pi.sh --join=FILE
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from federated.errors import FederationError
from plumbing.addresses import check_cid
from plumbing.security import keys
from plumbing.security.admissions import TOKEN_SECONDS, TOKEN_USES, Admissions, ListProblem

MOST = 1_000_000  # hours or uses of a token


def main(argv: Sequence[str]) -> str | None:
    """Run the command; return an error for sys.exit, or None."""
    parser = argparse.ArgumentParser(
        prog="server.py devices",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--keys", metavar="DIR", help="where keys are (default: ~/.config/flower-embedded)"
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", parents=[common], help="list the devices (the default)")
    token = commands.add_parser("token", parents=[common], help="make a token to join with")
    hours = TOKEN_SECONDS / 3600
    token.add_argument("--hours", type=float, default=hours, help=f"valid (default: {hours:g})")
    token.add_argument("--uses", type=int, default=TOKEN_USES, help=f"(default: {TOKEN_USES})")
    revoke = commands.add_parser("revoke", parents=[common], help="take admissions back")
    revoke.add_argument("cids", nargs="+", metavar="CID")
    prune = commands.add_parser("prune", parents=[common], help="remove the revoked from the list")
    prune.add_argument(
        "--days", type=float, default=math.inf, help="and devices not seen for so long"
    )
    by_file = commands.add_parser("admit", parents=[common], help="make key files for devices")
    by_file.add_argument("cids", nargs="+", metavar="CID")
    by_file.add_argument(
        "--out", required=True, metavar="DIR", help="where to write device-CID.pem"
    )
    if not argv or argv[0].startswith("--keys"):
        argv = ["list", *argv]
    args = parser.parse_args(argv)

    directory = Path(args.keys).expanduser() if args.keys else keys.default_keys_dir()
    try:
        if args.command != "token" and not (directory / "authority.pem").exists():
            raise FederationError(
                f"there is no authority in '{directory}' yet; server.py --secure makes one"
            )
        authority = keys.Authority(directory)
        admissions = Admissions(authority.directory)
        if args.command == "list":
            print_devices(admissions)
            print(f"keys in {directory}, authority sha256:{authority.hash}")
        elif args.command == "token":
            if not (0 < args.hours <= MOST and 1 <= args.uses <= MOST):
                raise FederationError(
                    f"--hours {args.hours:g} and --uses {args.uses} must be above 0 and at most "
                    f"{MOST:,}"
                )
            print(admissions.make_token(authority.hash, args.uses, 3600 * args.hours))
            # Apart from the token, which a script may take from standard output.
            print(
                f"made a token for {args.uses} devices, valid for {args.hours:g} hours",
                file=sys.stderr,
            )
        elif args.command == "revoke":
            revoke_all(admissions, args.cids)
        elif args.command == "prune":
            if not args.days > 0:
                raise FederationError(f"--days {args.days:g} must be above 0")
            cids = admissions.prune(args.days)
            print(f"removed {len(cids)} from the list" + (f": {', '.join(cids)}" if cids else ""))
        else:
            for path in admit(authority, admissions, args.cids, Path(args.out).expanduser()):
                print(f"{path}: copy it to its device, join there with --join=FILE, delete it")
    except FederationError as error:
        return f"server.py: {error}"
    return None


def revoke_all(admissions: Admissions, cids: Sequence[str]) -> None:
    """Revoke each device that is admitted.

    Raises:
        FederationError: one of them is not; the others are revoked all the same.
    """
    problems = []
    for cid in cids:
        try:
            admissions.revoke(cid)
            print(f"device {cid} is revoked: cut off now, and not let in again by its key")
        except ListProblem:
            raise
        except FederationError as error:
            problems.append(str(error))
    if len(problems) < len(cids):
        print("open tokens are closed, it may know one; for a new one: server.py devices token")
    if problems:
        raise FederationError("; ".join(problems))


def print_devices(admissions: Admissions) -> None:
    """Print a table of the devices."""
    devices = admissions.all()
    rows = [["device", "admitted", "by", "last seen", "from", "key", ""]]
    for device in devices:
        rows.append(
            [
                device.cid,
                _time(device.admitted),
                device.how,
                _time(device.last_seen),
                device.last_address or "",
                device.key_hash[:16],
                f"revoked {_time(device.revoked)}" if device.revoked else "",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
    if not devices:
        print("none so far; they join with --join=TOKEN, and server.py devices token makes one")


def admit(
    authority: keys.Authority, admissions: Admissions, cids: Sequence[str], out: Path
) -> Iterator[Path]:
    """Admit devices; yield for each the file in `out` that holds its key and certificate."""
    keys.private_directory(out)
    for cid in cids:
        check_cid(cid)
        path = out / f"device-{cid}.pem"
        if path.exists():
            raise FederationError(f"'{path}' is there already; remove it or choose another --out")
        key = keys.new_key()
        certificate = authority.sign_device(cid, key.public_key())
        # The file first: an admission without its key would only keep the cid.
        keys.write_private(path, keys.key_pem(key) + certificate + authority.pem)
        try:
            admissions.admit(cid, keys.public_key_hash(key.public_key()), certificate)
        except FederationError:
            path.unlink()
            raise
        yield path


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))

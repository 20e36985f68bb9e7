"""The server's flags. No package is needed to read them:

    python3 -m plumbing.flags FLAGS

checks them before run_local.sh installs any, and prints --help.
"""

import sys
from dataclasses import fields

from federated.errors import FederationError
from federated.settings import RunSettings
from plumbing import cli

DEVICE_FLAGS = dict.fromkeys(
    ("cid", "device", "join", "join_only", "max_wait_seconds", "stay"), "client.py"
)


def server_parser(description: str | None, **kwargs: str) -> cli.Parser:
    """Return the parser of server.py's command line."""
    parser = cli.Parser(description=description, others=DEVICE_FLAGS, **kwargs)
    parser.flag("server_address", "where to listen", "0.0.0.0:8080", metavar="HOST:PORT")
    parser.add_settings(RunSettings)
    # Files
    parser.flag(
        "data_dir",
        "CIFAR-10, or test/<class>/*; or synthetic (default: data/)",
        metavar="DIR",
    )
    parser.flag(
        "init_weights", "start from this .safetensors file, or torchvision:NAME", metavar="FILE"
    )
    parser.switch(
        "new_head", "what --init_weights does not have, or has in another size, starts at random"
    )
    parser.flag("run_dir", "where to leave results (default: runs/<time>-<model>/)", metavar="DIR")
    parser.flag(
        "resume",
        "continue the run in this directory, or the newest in runs/ that has a finished round, "
        "after its last finished round; its settings hold unless flags override them",
        nargs="?",
        const="",
        metavar="DIR",
    )
    parser.flag(
        "own_data",
        "the server trains, too, on DIR/train/<class>/*, which count WEIGHT times",
        metavar="DIR:WEIGHT",
    )
    # A service without an end
    parser.switch("open_ended", "train on as devices come; --lr stays as it is")
    parser.flag("every", "begin no round sooner than S seconds after the last", 0.0, metavar="S")
    parser.flag(
        "gate_data",
        "photographs that judge each new model before it is handed out: test/<class>/*, "
        "or a quarter of train/<class>/* (default: those that test)",
        metavar="DIR",
    )
    parser.flag("threads", "processor threads; auto is the fastest number", "auto", metavar="N")
    parser.flag("log_file", "append all lines here, too, with times", metavar="FILE")
    # What is seen in the browser
    parser.flag(
        "page",
        "where; on: the first free port at 127.0.0.1 from 8081 on; off (default: on at a terminal)",
        "",
        metavar="HOST:PORT",
    )
    parser.switch("page_stay", "leave the page there after the run, until Ctrl-C")
    # Who may connect
    parser.switch("secure", "TLS, and only devices that you admit; they join with a token")
    parser.switch("insecure", "let in any device that reaches the port, also from the Internet")
    parser.flag("keys", "where keys are (default: ~/.config/flower-embedded)", metavar="DIR")
    parser.flag("names", "further names of this machine, for --secure: a.example,203.0.113.5", "")
    parser.flag(
        "unauthenticated_address",
        "listen here too, with TLS, for stock Flower clients: any that reaches it can join",
        "",
        metavar="HOST:PORT",
    )
    return parser


def main() -> None:
    """Check the flags of run_local.sh, which are the server's."""
    text = "A server and its clients on this machine. All flags are those of server.py."
    args = server_parser(text, prog="run_local.sh").parse_args()
    if args.resume is not None:
        return  # the settings are those of the run
    try:
        RunSettings(**{f.name: getattr(args, f.name) for f in fields(RunSettings)}).check()
        cli.check_threads(args.threads)
    except FederationError as error:
        sys.exit(f"run_local.sh: {error}")


if __name__ == "__main__":
    main()

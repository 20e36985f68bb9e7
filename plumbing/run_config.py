"""The settings of a run on Flower's engine, as `flwr run` hands them over.

python -m plumbing.run_config     prints what pyproject.toml must list in [tool.flwr.app.config]
"""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from federated.errors import FederationError
from federated.settings import EngineSettings, RunSettings, typed
from plumbing.runs import load_config, new_run_name


def flower_home() -> Path:
    """Return the directory in which Flower keeps what it needs on this machine."""
    return Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser()


def read_config(config: Mapping[str, Any]) -> tuple[RunSettings, argparse.Namespace]:
    """Return the run's settings, and its files.

    Of a run that is resumed the settings hold, except for those that are given: what Flower hands
    over does not show which are, so a default counts as not given unless `override` names it.

    Raises:
        FederationError: they cannot work.
    """
    values = typed(RunSettings, config, "the run config's")
    files = EngineSettings(**typed(EngineSettings, config, "the run config's"))
    run_id = ""
    if files.resume:
        defaults = {declared.name: declared.default for declared in fields(RunSettings)}
        saved = load_config(Path(files.resume), {**defaults, "run_id": ""})
        run_id = saved.pop("run_id", "")
        override = files.override.split(",")
        values = saved | {n: v for n, v in values.items() if n in override or v != defaults[n]}
    settings = RunSettings(**values)
    settings.check()
    default = flower_home() / "runs" / new_run_name(settings.model)
    run_dir = files.resume or files.run_dir or str(default)
    for what, path in (("data_dir", files.data_dir), ("run_dir", run_dir)):
        if not Path(path).is_absolute() and not path.startswith("synthetic"):
            raise FederationError(
                f"{what} '{path}' is not absolute; Flower's processes start in other directories"
            )
    return settings, argparse.Namespace(
        data_dir=files.data_dir,
        run_dir=run_dir,
        init_weights=files.init_weights or None,
        new_head=False,
        open_ended=False,
        every=0.0,
        gate_data=None,
        own_data=None,
        resume=files.resume or None,
        run_id=run_id,
        threads=str(files.threads or "auto"),
    )


def main() -> None:
    """Print the settings with their defaults."""
    for name, default in (asdict(RunSettings()) | asdict(EngineSettings())).items():
        print(f"{name} = {json.dumps(default)}")


if __name__ == "__main__":
    main()

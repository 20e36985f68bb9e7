"""A user's own classes, from files in the working directory: --strategy and --model mine:Mine."""

import importlib
import sys
from pathlib import Path
from typing import Any

from federated.errors import FederationError


def load_class(flag: str, module: str, name: str) -> Any:
    """Return what `name` is in `module`, a file in the working directory.

    Raises:
        FederationError: there is no such thing, or the module does not import.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    choice = f"{flag} {module}:{name}"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            raise FederationError(f"{choice}: there is no {module}.py in '{Path.cwd()}'") from None
        raise FederationError(f"{choice}: {module}.py needs {error.name}, not found") from None
    except Exception as error:  # a user's file may raise anything
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise FederationError(f"{choice}: {module}.py cannot be imported ({problem})") from None
    if not hasattr(found, name):
        raise FederationError(f"{choice}: {module}.py has no {name}")
    return getattr(found, name)

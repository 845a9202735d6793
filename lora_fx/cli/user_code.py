"""The user's own Python: loaded by module or file, its exceptions told with file and line."""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from lora_fx.errors import LoraFxError

_HERE = Path(__file__).parents[1]
_ROOMS = (_HERE, _HERE.with_name("passes"), _HERE.with_name("export"))  # beside it in a checkout
_INSTALLED = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
_TORCH = importlib.util.find_spec("torch")  # which is not loaded for it: --help has no use for it
_BESIDE_TORCH = [Path(_TORCH.origin).parents[1]] if _TORCH and _TORCH.origin else []
_NOT_THE_USERS = tuple(f"{place}{os.sep}" for place in (*_ROOMS, *_INSTALLED, *_BESIDE_TORCH))


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Runs code that is the user's: it may raise anything, and even end the process.

    Args:
        what: the command line's words for it, which the message starts with.

    Raises:
        LoraFxError: whatever was raised, with the file and line of the user's code.
    """
    try:
        with warnings.catch_warnings():  # its filters are not to hold for what we do afterwards
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise LoraFxError(f"{what}: {words(error)}{users_line(error)}") from error


def load_module(place: str) -> ModuleType:
    """Imports a module by its dotted name, or a ``.py`` file by its path.

    What lies beside the file, or in the current directory, can be imported by it.
    """
    path = Path(place)
    is_file = place.endswith(".py") and path.is_file()
    beside = str(path.resolve().parent) if is_file else os.getcwd()
    if beside not in sys.path:  # an installed script does not see the user's own directory
        sys.path.insert(0, beside)
    if not is_file:
        return importlib.import_module(place)
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    name = path.stem if known is None else f"{path.stem} of {path.resolve()}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None, f"{path} ends in .py"
    assert spec.loader is not None, f"{path} ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look it up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # as an import does
        raise
    return module


def words(error: BaseException) -> str:
    """What was raised, in one line or a few."""
    if isinstance(error, SystemExit):
        return f"the code called sys.exit({error.code!r:.80})"
    try:
        text = str(error).strip()
    except Exception:  # the user's own class may fail to say anything
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def users_line(error: BaseException) -> str:
    """Where the user's code was when an error was raised: file, line, source; or nothing."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if not file.startswith("<") and not file.startswith(_NOT_THE_USERS):
            found = f", at {file}:{line}: {linecache.getline(file, line).strip()}"
    return found

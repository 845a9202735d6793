"""What Python does while a case is read: an audit hook, which nothing can take off."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Never, whatever a file says.
_NEVER = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "os.kill",
    "socket.", "urllib.", "http.", "ftplib.", "smtplib.", "ssl.", "pickle.find_class",
    "ctypes.dlopen", "os.chmod", "os.chown", "webbrowser.", "code.__new__",
)  # fmt: skip
# What has a path: its place among the arguments.
_WRITES = {
    "os.rename": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,), "os.truncate": (0,),
    "os.link": (0, 1), "os.symlink": (1,), "shutil.rmtree": (0,), "shutil.copyfile": (1,),
    "shutil.move": (1,), "tempfile.mkdtemp": (0,), "tempfile.mkstemp": (0,),
}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Where the interpreter and its packages are: what they read of themselves is no answer to a file.
_OWN = tuple(
    {str(Path(path).resolve()) for path in (sys.prefix, sys.base_prefix, *sys.path) if path}
    | {"/usr/lib", "/usr/share", "/proc", "/sys", "/dev/null", "/dev/urandom", "/etc/localtime"}
)


class Watch:
    """Notes what is done outside of a directory, or should never be done."""

    def __init__(self) -> None:
        self._home: str | None = None
        self._seen: list[str] = []
        sys.addaudithook(self._hook)

    @contextmanager
    def over(self, home: Path) -> Iterator[None]:
        """Watches what is done for a case, which may write in its own directory alone."""
        self._home = str(home)
        try:
            yield
        finally:
            self._home = None

    def taken(self) -> list[str]:
        """What was noted since."""
        seen, self._seen = self._seen, []
        return seen

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        home = self._home
        if home is None:
            return
        self._home = None  # what is done in here is ours
        try:
            if problem := self._problem(event, args, home):
                self._seen.append(f"{event} {problem}"[:300])
        finally:
            self._home = home

    def _problem(self, event: str, args: tuple[Any, ...], home: str) -> str | None:
        if event.startswith(_NEVER):
            return str(args)
        if event in _WRITES:
            paths = [args[place] for place in _WRITES[event]]
            return next((str(p) for p in paths if not _is_in(p, (home,))), None)
        if event == "open" and isinstance(args[0], str | bytes):
            writes = bool(args[2] & _WRITING)
            own = (home,) if writes else (home, *_OWN)
            return None if _is_in(args[0], own) else f"{args[0]!r} {'w' if writes else 'r'}"
        if event == "exec":
            file = args[0].co_filename
            return file if _is_in(file, (home,)) and os.path.exists(file) else None
        if event == "import":
            return str(args[0]) if "evil" in str(args[0]) else None
        return None


def _is_in(path: object, places: tuple[str, ...]) -> bool:
    real = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
    return any(real == place or real.startswith(place.rstrip("/") + "/") for place in places)

"""One process at a time in one folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from next_core.errors import ConfigError
from next_core.storage.atomic import doing
from next_core.storage.reading import read_text


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """No second process on one folder. Raises ``ConfigError`` naming the other; a killed one holds nothing."""
    lock = target.parent / f".{target.name}.lock"  # not within: the folder itself may be replaced
    with doing("locking", target):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = _acquired(lock)
    if file is None:
        raise ConfigError(
            f"{target} is in use by process {_text(lock) or '?'}; wait for it, end it, or choose another folder"
        )
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


_HELD: dict[Path, contextlib.ExitStack] = {}


def hold(target: Path) -> None:
    """``locked`` until ``release``, or until this process ends; what it holds already it goes on to hold."""
    if target.absolute() not in _HELD:
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(target))
            _HELD[target.absolute()] = stack.pop_all()


def release(target: Path) -> None:
    """Let other processes have what this one holds, if it does."""
    _HELD.pop(target.absolute(), contextlib.ExitStack()).close()


def _acquired(lock: Path) -> Any:
    """The lock's open file, held; None where another process holds it."""
    while True:
        file = lock.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                file.close()
                raise  # else a file system without locks, where nobody can be kept out
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                return file
        file.close()  # its last holder has removed it since it was opened


def _text(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return read_text(path)
    return ""

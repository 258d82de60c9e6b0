"""A lock that keeps a second process out of a folder."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from next_core.errors import ConfigError
from next_core.storage.atomic import disk_operation
from next_core.storage.reading import read_text


def lock_file(target: Path) -> Path:
    """Return the file that locks a folder. It is not inside: the folder itself may be replaced."""
    target = target.absolute()
    return target.parent / f".{target.name}.lock"


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Lock a folder for this process; the operating system releases the lock of a killed one.

    Raises ``ConfigError`` with the number of the process that holds the lock. On a file system without locks it locks
    nothing.
    """
    path = lock_file(target)
    lock = FileLock(path, thread_local=False)
    with disk_operation("locking", target):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0.2)  # a holder that is just releasing it is gone by then
            path.write_text(str(os.getpid()))
        except Timeout:
            raise ConfigError(
                f"{target} is in use by process {_holder(path)}; wait for it, stop it, or choose another folder",
                kind="config-folder-in-use",
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
    try:
        yield
    finally:
        if lock.is_locked:
            path.unlink(missing_ok=True)
            lock.release()


def holder(target: Path) -> str | None:
    """Return the number of the process that has locked a folder, None if none has, "?" if it is not known."""
    path = lock_file(target)
    if not path.exists():
        return None
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _holder(path)
    except OSError:  # a folder of someone else, or a file system without locks
        return None
    lock.release()
    return None


_HELD: dict[Path, contextlib.ExitStack] = {}


def hold(target: Path) -> None:
    """Lock a folder until ``release`` or the end of this process; holding it twice does nothing more."""
    if target.absolute() not in _HELD:
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(target))
            _HELD[target.absolute()] = stack.pop_all()


def release(target: Path) -> None:
    """Release a folder that this process holds, if it does."""
    _HELD.pop(target.absolute(), contextlib.ExitStack()).close()


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return read_text(path) or "?"
    return "?"

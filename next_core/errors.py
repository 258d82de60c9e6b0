"""The errors a user can meet. Each names what is wrong and the remedy, has a stable kind, and knows its exit code."""

from pathlib import Path
from typing import ClassVar


class NextCoreError(Exception):
    """Base of every error this project raises on purpose.

    ``kind`` is a stable identifier such as ``checkpoint-incomplete``: match on it, never on the message.
    docs/errors.md lists every kind with its remedy. ``str(error)`` ends with the kind in brackets.
    """

    default_kind: ClassVar[str] = "next-core"
    exit_code: int = 1
    """Exit code of the command line."""

    def __init__(self, message: str, *, kind: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind or self.default_kind

    def __str__(self) -> str:
        return f"{self.message} [{self.kind}]"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with all attributes: errors cross process boundaries."""
        return _rebuild, (type(self), self.__dict__)


def _rebuild(cls: type[NextCoreError], attributes: dict[str, object]) -> NextCoreError:
    error = cls.__new__(cls, attributes["message"])
    error.__dict__.update(attributes)
    return error


def wrong_shape(message: str) -> NextCoreError:
    """Return the error for matrices or factors whose shapes do not fit."""
    return NextCoreError(message, kind="numbers-shape")


class ConfigError(NextCoreError):
    """A setting is wrong, unknown or contradicts another."""

    default_kind = "config"
    exit_code = 2


def invalid_value(message: str) -> ConfigError:
    """Return the error for a setting whose value is out of range, or cannot be understood."""
    return ConfigError(message, kind="config-invalid-value")


def contradiction(message: str) -> ConfigError:
    """Return the error for settings that exclude each other."""
    return ConfigError(message, kind="config-contradiction")


class CheckpointError(NextCoreError):
    """A checkpoint is missing, damaged, or does not belong to its run."""

    default_kind = "checkpoint"
    exit_code = 3


class GuardError(NextCoreError):
    """A guard refused a jump, and the run treats that as a failure (``--strict``)."""

    default_kind = "guard"
    exit_code = 4


class PluginError(NextCoreError):
    """A plug-in is unknown, broken, or claims a name that is taken."""

    default_kind = "plugin"
    exit_code = 5


def wrong_answer(message: str) -> PluginError:
    """Return the error for what a predictor returned and cannot be used."""
    return PluginError(message, kind="predictor-wrong-answer")


class BackendError(NextCoreError):
    """A trainer failed, or cannot do what was asked of it."""

    default_kind = "backend"
    exit_code = 6


def unsupported(message: str) -> BackendError:
    """Return the error for what a trainer or its backend cannot do."""
    return BackendError(message, kind="backend-unsupported")


def trainer_failed(message: str) -> BackendError:
    """Return the error for a trainer that did not do what was asked of it."""
    return BackendError(message, kind="backend-failed")


def trainer_lost(message: str) -> BackendError:
    """Return the error for a trainer's process that has ended or does not answer."""
    return BackendError(message, kind="backend-process-lost")


class StorageError(NextCoreError, OSError):
    """The disk is full or not writable; everything that was complete before is still there."""

    default_kind = "storage"
    exit_code = 7


class Interrupted(NextCoreError):  # noqa: N818 - nothing is wrong
    """Ctrl-C or SIGTERM ended a run, and its state was saved; the exit code is the shell's."""

    default_kind = "interrupted"

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


def describe(error: BaseException) -> str:
    """Return one line for an exception: its class and the first line of its message."""
    text = (error.message if isinstance(error, NextCoreError) else str(error)).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def ambiguous_step(message: str) -> CheckpointError:
    """Return the error for names that do not determine the steps."""
    return CheckpointError(message, kind="checkpoint-ambiguous-step")


def not_found(message: str) -> CheckpointError:
    """Return the error for a folder, step or tensor that does not exist."""
    return CheckpointError(message, kind="checkpoint-not-found")


def no_history(message: str) -> CheckpointError:
    """Return the error for checkpoints that are needed and were not kept."""
    return CheckpointError(message, kind="checkpoint-no-history")


def other_model(message: str) -> CheckpointError:
    """Return the error for files that do not belong to one run."""
    return CheckpointError(message, kind="checkpoint-other-model")


def unsafe_path(message: str) -> CheckpointError:
    """Return the error for a path that leads out of its folder."""
    return CheckpointError(message, kind="checkpoint-unsafe-path")


def damaged(path: Path, problem: str) -> CheckpointError:
    """Return the error for a file whose content is wrong."""
    return CheckpointError(f"{path} {problem}; restore it, or remove its folder", kind="checkpoint-damaged")


def incomplete(path: Path, problem: str) -> CheckpointError:
    """Return the error for a file or folder that lacks something."""
    return CheckpointError(
        f"{path} {problem}; the checkpoint is incomplete: remove or restore it", kind="checkpoint-incomplete"
    )

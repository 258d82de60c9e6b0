"""The errors a user can meet. Each names the thing that is wrong and the remedy, and knows its exit code."""

from __future__ import annotations


class NextCoreError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code: int = 1
    """Of the command line."""


class ConfigError(NextCoreError):
    """A setting is wrong, unknown or contradicts another."""

    exit_code = 2


class CheckpointError(NextCoreError):
    """A checkpoint is missing, damaged, or does not belong to its run."""

    exit_code = 3


class GuardError(NextCoreError):
    """A guard refused a jump, and the run was told to treat that as a failure (``--strict``)."""

    exit_code = 4


class PluginError(NextCoreError):
    """A plug-in is unknown, broken, or claims a name that is taken."""

    exit_code = 5


class BackendError(NextCoreError):
    """A trainer failed, or cannot do what was asked of it."""

    exit_code = 6


class StorageError(NextCoreError, OSError):
    """The disk is full, or may not be written; what was complete before stays."""

    exit_code = 7


class Interrupted(NextCoreError):  # noqa: N818 - nothing is wrong
    """A run was asked to end (Ctrl-C, SIGTERM), and ended with its state kept; the exit code is the shell's."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal

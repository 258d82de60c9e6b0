"""The errors a user can meet. Each names the thing that is wrong and the remedy, and knows its exit code."""

from __future__ import annotations

from typing import ClassVar


class NextCoreError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code: ClassVar[int] = 1


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

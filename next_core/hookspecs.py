"""The hooks of the pluggy project ``next_core``; a plug-in is found through the entry-point group of that name.

Each hook is handed ``register``: call it with a class that carries its own ``name``, or, to keep a heavy import
until the name is used, with ``register("package.module:Class", name="...")``.
"""

from collections.abc import Callable

import pluggy

PROJECT = "next_core"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Register = Callable[..., None]


@hookspec
def register_predictors(register: Register) -> None:
    """Register subclasses of ``TrajectoryPredictor``, or functions made one by ``@matrix_predictor``."""


@hookspec
def register_compressors(register: Register) -> None:
    """Register subclasses of ``Compressor``."""


@hookspec
def register_sources(register: Register) -> None:
    """Register subclasses of ``CheckpointSource``; each has ``detect(path)`` to claim a layout."""


@hookspec
def register_appliers(register: Register) -> None:
    """Register subclasses of ``WeightApplier``."""


@hookspec
def register_rewards(register: Register) -> None:
    """Register subclasses of ``Reward``."""


@hookspec
def register_backends(register: Register) -> None:
    """Register subclasses of ``Backend``."""

"""TRL: ``PredictExtendCallback`` for a trainer you have, ``TrlBackend`` for one built from a config.

``last_checkpoint`` finds the checkpoint that a killed run can be resumed from.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from next_backends.trl.build import last_checkpoint
    from next_backends.trl.callback import PredictExtendCallback
    from next_backends.trl.trl_backend import TrlBackend

__all__ = ["PredictExtendCallback", "TrlBackend", "last_checkpoint"]
_WHERE = {"PredictExtendCallback": "callback", "TrlBackend": "trl_backend", "last_checkpoint": "build"}


def __getattr__(name: str) -> Any:
    """Import on first use: a config can be validated where transformers and TRL are not installed."""
    if name not in _WHERE:
        raise AttributeError(f"module 'next_backends.trl' has no attribute '{name}'")
    if name == "PredictExtendCallback":
        from next_core.process.optional_packages import import_optional

        import_optional("trl", "trl")
    return getattr(importlib.import_module(f"next_backends.trl.{_WHERE[name]}"), name)

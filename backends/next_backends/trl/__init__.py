"""TRL: ``PredictExtendCallback`` for a trainer you have, ``TrlBackend`` for one built from a config."""

from __future__ import annotations

from next_backends.trl.backend import TrlBackend
from next_backends.trl.callback import PredictExtendCallback

__all__ = ["PredictExtendCallback", "TrlBackend"]

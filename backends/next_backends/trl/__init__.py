"""TRL: ``PredictExtendCallback`` for a trainer you have, ``TrlBackend`` for one built from a config.

``last_checkpoint`` finds what a trainer that was killed can go on from.
"""

from __future__ import annotations

from next_backends.trl.build import last_checkpoint
from next_backends.trl.callback import PredictExtendCallback
from next_backends.trl.trl_backend import TrlBackend

__all__ = ["PredictExtendCallback", "TrlBackend", "last_checkpoint"]

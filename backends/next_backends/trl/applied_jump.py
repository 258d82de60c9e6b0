"""A jump in a live trainer, and how it is undone: at once, steps later, or by a resumed process."""

from __future__ import annotations

from pathlib import Path

from next_core.interfaces import Applied
from next_core.live_weights.frozen_adapters import remove_adapter
from next_core.live_weights.in_memory import InMemoryApplied
from next_core.live_weights.live_model import LiveModel


class TrlApplied(Applied):
    """A jump with its folder: one of this process, or an earlier one's, which is undone from the files there."""

    def __init__(self, live: LiveModel, folder: Path, made: InMemoryApplied | None, adapter: str | None) -> None:
        self.folder = folder
        self._live, self._made, self._adapter = live, made, adapter

    def rollback(self) -> None:
        if self._made is not None:
            self._made.rollback()
            return
        self._live.restore_saved(self.folder)
        if self._adapter is not None:
            self._live.change_adapters(remove_adapter, self._adapter)

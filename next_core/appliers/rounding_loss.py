"""How much of a jump is left once it has been rounded to the precision that is stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Share:
    """<written - start, wanted> / <wanted, wanted>, summed up over blocks: 1 when all of it landed."""

    along: float = 0.0
    wanted: float = 0.0

    def add(self, moved: Tensor, wanted: Tensor) -> None:
        moved, wanted = moved.reshape(-1), wanted.reshape(-1)
        self.along += float(torch.dot(moved, wanted))
        self.wanted += float(torch.dot(wanted, wanted))

    @property
    def value(self) -> float | None:
        """None where nothing was wanted."""
        return self.along / self.wanted if self.wanted > 0 else None


@dataclass
class Landed:
    """What became of one jump; every figure by parameter.

    ``jump`` counts from the newest checkpoint, rounded to the precision that is stored; ``update`` from the backbone
    as it lies on disk (LoRA runs, where the training since then is written along with the jump). ``changed`` is how
    many stored values differ from the start of the jump.
    """

    jump: dict[str, Share] = field(default_factory=dict)
    update: dict[str, Share] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)

    def facts(self, lowest: int = 10) -> dict[str, Any]:
        """Pooled over all parameters, and the parameters with the lowest shares."""
        worst = sorted((value, name) for name, value in shares(self.jump).items())[:lowest]
        return {
            "share_of_jump": pooled(self.jump),
            "share_of_update": pooled(self.update),
            "lowest_shares_of_jump": {name: value for value, name in worst},
            "parameters_moved": sum(1 for count in self.changed.values() if count),
            "elements_changed": sum(self.changed.values()),
            "elements": sum(self.elements.values()),
        }


def shares(by_name: dict[str, Share]) -> dict[str, float]:
    """The share of each parameter of which something was wanted."""
    return {name: share.value for name, share in by_name.items() if share.value is not None}


def pooled(by_name: dict[str, Share]) -> float | None:
    """One share over all parameters, each weighted by the squared norm of what was wanted of it."""
    return Share(sum(s.along for s in by_name.values()), sum(s.wanted for s in by_name.values())).value

"""The interface of predictors that scale the trainer's own steps instead of jumping."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field
from torch import Tensor

from next_core.predictor import Predictor
from next_core.settings import Settings


class StepConfig(Settings):
    """Settings of every predictor that scales steps."""

    block: int = Field(5, ge=1, description="RL steps in a block; a prediction is made at the end of each")


@dataclass(frozen=True)
class StepHistory:
    """What a step predictor reads at the end of a block that ends with RL step ``step``.

    ``multiple`` is in force. ``products``: the inner products of the motions of the last blocks, (n, n), oldest first,
    free of momentum and of the learning rate; at most four blocks. ``records``: the run's journal records of the
    events ``scale`` and ``collapse`` so far. ``can_restart``: whether the weights from before the first step are still
    kept and may be returned to now.
    """

    step: int
    multiple: float
    products: Tensor
    records: Sequence[Mapping[str, Any]] = ()
    can_restart: bool = True

    def cosine(self, blocks: int) -> float | None:
        """Return the cosine of the motion of the last ``blocks`` blocks and that of as many before; None if unknown."""
        if blocks < 1 or len(self.products) < 2 * blocks:
            return None
        late, early = slice(-blocks, None), slice(-2 * blocks, -blocks)
        scale = (self.products[late, late].sum() * self.products[early, early].sum()).clamp(min=0).sqrt()
        return float(self.products[late, early].sum() / scale) if scale > 0 else None


@dataclass(frozen=True)
class StepScale:
    """A prediction: multiply the learning rate of the following steps by ``multiple``.

    ``restart``: first return to the weights from before the first step, refused unless ``history.can_restart``.
    ``found``: the learning rate at which steps stop agreeing has been reached; the run's advice names it.
    """

    multiple: float
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    restart: bool = False
    found: bool = False


class StepPredictor(Predictor):
    """A predictor that says by how much the trainer's steps should be multiplied.

    It has no state of its own: what it needs to remember it puts into ``diagnostics``, which the journal keeps, so that
    a resumed run continues where it was.
    """

    config_class = StepConfig

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not issubclass(cls.config_class, StepConfig):
            raise TypeError(f"config_class of {cls.__name__} must derive from next_core.StepConfig")

    @abstractmethod
    def predict(self, history: StepHistory) -> StepScale:
        """Return the multiple of the steps that follow."""

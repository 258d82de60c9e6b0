"""The small values that every layer exchanges, and the base class of everything chosen by name."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from next_core.errors import contradiction
from next_core.settings import Settings, validated

if TYPE_CHECKING:
    from torch import Tensor

Space = Literal["factors", "merged"]
Anchor = Literal["newest", "backbone"]
Span = tuple[int, int | None]
"""A delta: (step, since); ``since`` None means where RL began."""
Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: called by long steps so that a caller can display it."""


class Plugin(ABC):
    """Base of everything that a config chooses by name. A class carries its own name and config class."""

    name: ClassVar[str]
    config_class: ClassVar[type[Settings]] = Settings

    def __init__(self, config: Settings | None = None, /, **fields: Any) -> None:
        """Take a config, or its fields: ``Secant(window=10)``. Raises ``ConfigError`` naming each wrong field."""
        if config is not None and fields:
            raise contradiction(f"{self.name}: pass a config or its fields, not both")
        self.config: Any = config if config is not None else validated(self.config_class, fields, self.name)


@dataclass(frozen=True)
class Parameter:
    """A weight matrix of the run: its name in the Hugging Face model, its shape (m, n), and its LoRA rank r."""

    name: str
    shape: tuple[int, int]
    rank: int | None = None

    @property
    def kind(self) -> Literal["lora", "dense"]:
        """Whether it is stored as LoRA factors or as the whole matrix."""
        return "dense" if self.rank is None else "lora"


@dataclass(frozen=True)
class LoraFactors:
    """One LoRA adapter of one matrix: the delta is ``scaling * B @ A``; A is (r, n), B is (m, r).

    They are stored under the name ``module``, as a part of larger tensors where that is a layer of fused experts.
    """

    A: Tensor
    B: Tensor
    scaling: float
    module: str = ""
    expert: int | None = None

"""What an analysis finds, as a value with tables and pictures, and as plain objects for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from next_core.diagnostics.drawing import Drawing, Drawings, drawn_or_error
from next_core.diagnostics.figures import FIGURES, Group
from next_core.diagnostics.learning_rate import LearningRate
from next_core.diagnostics.plots import draw_analysis
from next_core.process.optional_packages import import_optional


@dataclass(frozen=True)
class Precision:
    """How large deltas of half-precision checkpoints are next to the rounding step, per matrix over one interval."""

    step: int
    since: int
    delta_to_ulp: Mapping[str, float]
    drowned: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Analysis:
    """The geometry of a run; ``missing`` says why a figure is not there."""

    steps: tuple[int, ...]
    origin: int
    even: bool
    horizon: int | None
    draws: int
    seed: int
    overall: Group
    layers: Mapping[int, Group]
    kinds: Mapping[str, Group]
    matrices: Mapping[str, Group]
    frozen: Mapping[str, str]
    skipped: Mapping[str, str]
    missing: Mapping[str, str]
    learning_rate: LearningRate
    notes: Sequence[str] = ()
    precision: Precision | None = None
    advice: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain objects for JSON; no number is NaN or infinite."""
        each = {n: {"layer": one.layer, "kind": one.kind} | one.as_dict() for n, one in self.matrices.items()}
        found = {
            **vars(self),
            "evenly_spaced": self.even,
            "overall": self.overall.as_dict(),
            "layers": {str(layer): group.as_dict() for layer, group in self.layers.items()},
            "kinds": {kind: group.as_dict() for kind, group in self.kinds.items()},
            "per_matrix": each,
            "learning_rate": asdict(self.learning_rate),
            "precision": None if self.precision is None else asdict(self.precision),
        }
        return {key: value for key, value in found.items() if key not in ("even", "matrices")}

    def to_frame(self, by: Literal["matrix", "layer", "kind"] = "matrix") -> Any:
        """Return a pandas DataFrame with one column per figure, one row per matrix, layer or kind of matrix."""
        groups: Mapping[Any, Group] = getattr(self, {"matrix": "matrices", "layer": "layers", "kind": "kinds"}[by])
        rows = {
            name: {
                **({"layer": group.layer, "kind": group.kind} if by == "matrix" else {}),
                **{figure: group.value(figure) for figure in FIGURES},
            }
            for name, group in groups.items()
        }
        return import_optional("pandas", "notebook").DataFrame.from_dict(rows, orient="index").rename_axis(by)

    def draw(self) -> dict[str, Drawing | str]:
        """Return every plot by name, or why it was not drawn. Raises ``ConfigError`` without matplotlib."""
        return draw_analysis(self.overall, self.matrices, self.missing)

    def plot(self, name: str | None = None) -> Drawing | Drawings:
        """Draw all plots, or one by name. Raises ``ConfigError`` with the reason when it cannot be drawn."""
        drawn = self.draw()
        if name is None:
            return Drawings({key: one for key, one in drawn.items() if isinstance(one, Drawing)})
        return drawn_or_error(drawn.get(name, f"there is no plot '{name}'; known: {', '.join(drawn)}"))

    def __repr__(self) -> str:
        steps = f"steps {self.steps[0]} to {self.steps[-1]}"
        return f"<Analysis of {len(self.matrices)} matrices, {steps}; {' '.join(self.advice)}>"

    def _repr_html_(self) -> str:
        return str(self.to_frame("kind").to_html(float_format="%.3g"))

"""What an analysis finds, as a value with tables and pictures, and as plain objects for JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from next_core.diagnostics.figures import FIGURES, Figure, Group, number
from next_core.diagnostics.learning_rate import LearningRate, learning_rate_advice, null_in_words
from next_core.diagnostics.plots import draw_analysis
from next_core.drawing import Chart, Charts, drawn_or_error
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
        rows = {}
        for name, group in groups.items():
            place = {"layer": group.layer, "kind": group.kind} if by == "matrix" else {}
            rows[name] = {**place, **{figure: group.value(figure) for figure in FIGURES}}
        return import_optional("pandas", "notebook").DataFrame.from_dict(rows, orient="index").rename_axis(by)

    def draw(self) -> dict[str, Chart | str]:
        """Return every plot by name, or why it was not drawn."""
        return draw_analysis(self.overall, self.matrices, self.missing)

    def plot(self, name: str | None = None) -> Chart | Charts:
        """Draw all plots, or one by name. Raises ``ConfigError`` with the reason when it cannot be drawn."""
        drawn = self.draw()
        if name is None:
            return Charts({key: one for key, one in drawn.items() if isinstance(one, Chart)})
        return drawn_or_error(drawn.get(name, f"there is no plot '{name}'; known: {', '.join(drawn)}"))

    def __repr__(self) -> str:
        steps = f"steps {self.steps[0]} to {self.steps[-1]}"
        return f"<Analysis of {len(self.matrices)} matrices, {steps}; {' '.join(self.advice)}>"

    def _repr_html_(self) -> str:
        return str(self.to_frame("kind").to_html(float_format="%.3g"))


RANK_ONE = 0.9  # From this share of the energy on, one singular triplet describes nearly all of a delta
SLOW, FAST = 0.67, 1.5


def advice(analysis: Analysis) -> tuple[str, ...]:
    """Return one sentence for each figure that is there and means something."""
    if not analysis.matrices:
        return ("No matrix moved over the last interval: check that training changes the weights.",)
    return tuple(_sentences(analysis))


def _sentences(analysis: Analysis) -> Iterator[str]:
    def found(name: str) -> tuple[float | None, str]:
        figure = analysis.overall.figures.get(name, Figure(None))
        return figure.value, null_in_words(figure.null)

    if "line_skill" in analysis.missing:
        count = len(analysis.steps)
        have = f"{'Only ' * (count < 4)}{count} checkpoint{'s' * (count > 1)}"
        yield f"{have}: no out-of-sample figures ({analysis.missing['line_skill']})."
    value, null = found("cosine_local")
    if value is not None:
        motion = {
            "above": "Motion goes straight on" if value >= 0.5 else "Motion keeps part of its direction",
            "below": "Motion turns back on itself",
            None: "Successive steps cannot be told from a random walk",
        }[analysis.overall.figures["cosine_local"].outside]
        yield f"{motion}: median cosine of successive local deltas {number(value)}{null}."
    if sentence := learning_rate_advice(analysis.learning_rate):
        yield sentence
    value, null = found("pinned_skill")
    if value is not None:
        line = f"A line fitted to the past and continued {analysis.horizon} steps ahead"
        gain = f"removes {100 * value:.0f}% of the squared error of" if value > 0 else "is worse than"
        yield f"{line} {gain} staying put: skill {number(value)}{null}."
    value, null = found("c1_r2")
    if value is not None and null:
        yield f"The in-sample R2 of the leading time component, {number(value)}, is weak evidence of a line{null}."
    value, null = found("squared_energy_ratio_global")
    if value is not None:
        nearly = "nearly" if value >= RANK_ONE else "not"
        share = f"the first singular triplet carries {100 * value:.0f}% of the energy"
        yield f"The newest deltas are {nearly} of rank 1: {share}{null}."
    value, _ = found("speed_ratio")
    if value is not None and not SLOW <= value <= FAST:
        changes = "slows down" if value < 1 else "speeds up"
        yield f"Motion {changes}: the last third of the run moves {value:.2f} times as fast as the first."
    if analysis.precision is not None and analysis.precision.drowned:
        stored = analysis.precision
        yield (
            f"Checkpoints are stored too coarsely for {len(stored.drowned)} of {len(stored.delta_to_ulp)} matrices: "
            f"from step {stored.since} to {stored.step} rounding drowns the rank-1 signal. Store LoRA factors or fp32 "
            "checkpoints, or compare checkpoints that are further apart."
        )

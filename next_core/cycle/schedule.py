"""When to observe and when to jump: the paper's one large jump and many small ones are the same data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from next_core.errors import ConfigError

if TYPE_CHECKING:
    from next_core.interfaces import TrajectoryPredictor


class Schedule(BaseModel):
    """All counts are RL steps. A jump costs no step: the counter goes on where it was."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    observe: int = Field(50, ge=1, description="Steps before the first jump")
    every: int = Field(5, ge=1, description="Steps between checkpoints")
    horizon: int = Field(10, ge=1, description="How many steps ahead to predict")
    alpha: float = Field(1.0, gt=0, description="Scale of the jump; a predictor may damp it per matrix")
    jump_every: int | None = Field(None, ge=1, description="Steps between jumps; without it there is one jump")
    jumps: int | None = Field(None, ge=1, description="At most this many jumps; without it as many as fit")
    settle: int = Field(0, ge=0, description="Last steps of the run, without a jump")
    average: int | None = Field(
        None,
        ge=1,
        description="At the end, go to the mean of the checkpoints of the last so many steps, or of a half or a "
        "quarter of them, if validation accuracy rises by it",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("observe", "jump_every"):
            value = getattr(self, name)
            if value is not None and value % self.every:
                raise ValueError(
                    f"{name} ({value}) must be a multiple of every ({self.every}): a jump starts at a checkpoint"
                )
        if self.average is not None and self.average < 2 * self.every:
            raise ValueError(f"average ({self.average}) must be at least two checkpoints, 2 x every ({2 * self.every})")
        if self.jump_every is None and (self.jumps or 1) > 1:
            raise ValueError(f"jumps: {self.jumps} needs jump_every, the steps between them")
        return self

    @property
    def limit(self) -> float:
        """How many jumps at most."""
        if self.jumps is not None:
            return self.jumps
        return 1 if self.jump_every is None else float("inf")

    def observes(self, step: int) -> bool:
        """Whether a checkpoint is taken after ``step``."""
        return step % self.every == 0

    def attempts(self, step: int, total: int) -> bool:
        """Whether a jump is tried after ``step`` of a run of ``total`` steps (the limit not counted)."""
        if not self.observe <= step <= total - self.settle:
            return False
        return step == self.observe if self.jump_every is None else (step - self.observe) % self.jump_every == 0

    def attempt_steps(self, total: int) -> list[int]:
        """Every step after which a jump is tried."""
        return [step for step in range(self.observe, total + 1) if self.attempts(step, total)]

    def check_predictor(self, predictor: TrajectoryPredictor, total: int) -> None:
        """Raise ``ConfigError`` when the checkpoints of this schedule never carry what a predictor needs."""
        attempts = self.attempt_steps(total)
        reasons = [predictor.lacks(range(self.every, step + 1, self.every), self.horizon) for step in attempts]
        if reasons and None not in reasons:
            raise ConfigError(
                f"predictor '{predictor.name}' can never act on this schedule; after step {attempts[-1]}: {reasons[-1]}"
            )

    def check(self, total: int) -> None:
        """Raise ``ConfigError`` when a run of ``total`` steps leaves no room for a jump."""
        if not self.attempt_steps(total):
            raise ConfigError(
                f"no jump would ever happen: observe ({self.observe}) + settle ({self.settle}) exceed the run's "
                f"{total} steps; shorten one of them or train longer"
            )

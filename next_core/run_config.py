"""A run's settings as plain data: the schedule, the guards, what is trained and how. No registry, no trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from next_core.errors import ConfigError
from next_core.history.executor import Executor
from next_core.predictor import TrajectoryPredictor
from next_core.settings import Settings
from next_core.sources.hub import NAME

DEFAULT_BACKEND = "trl"
DEFAULT_PREDICTOR = "auto"  # The predictor of a config that names none; docs/benchmarks/auto.md has the figures
DATA_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Suffixes of files of prompts, with the names of their formats in `datasets`."""
MOST_STEPS = 1_000_000  # Limit on a run's RL steps: a schedule is checked step by step


class Choice(BaseModel):
    """A plug-in by name with its own settings; a bare name stands for its defaults."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(description="The plug-in's registered name")

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def fields(self) -> dict[str, Any]:
        """The plug-in's own settings."""
        return dict(self.model_extra or {})


class Schedule(Settings):
    """When to observe and when to jump. All counts are RL steps; a jump is not a step."""

    observe: int = Field(50, ge=1, description="Steps before the first jump")
    every: int = Field(5, ge=1, description="Steps between checkpoints")
    horizon: int = Field(10, ge=1, description="How many steps ahead to predict")
    alpha: float = Field(1.0, gt=0, description="Scale of the jump; a predictor may damp it per matrix")
    alphas: list[Annotated[float, Field(gt=0)]] | None = Field(
        None,
        min_length=1,
        description="Scales to choose from instead of alpha: each is tried and undone, in this order, while accuracy "
        "on the validation prompts rises; without a rise there is no jump",
    )
    jump_every: int | None = Field(None, ge=1, description="Steps between jumps; without it there is one jump")
    jumps: int | None = Field(None, ge=1, description="At most this many jumps; without it as many as fit")
    settle: int = Field(0, ge=0, description="Last steps of the run, without a jump")
    average: int | None = Field(
        None,
        ge=1,
        description="At the end, go to the mean of the checkpoints of the last so many steps, or of a half or a "
        "quarter of them, if validation accuracy rises by it",
    )
    keep: Literal["all", "needed"] = Field(
        "all",
        description="Which checkpoints stay: all, for `analyze`, `backtest`, `report` and advice; or those that later "
        "jumps, resumes, rollbacks and the mean at the end will read",
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

    def observes(self, step: int) -> bool:
        """Whether a checkpoint is taken after ``step``."""
        return step % self.every == 0

    def attempts(self, step: int, total: int) -> bool:
        """Whether a jump is attempted after ``step`` of a run of ``total`` steps, regardless of ``jumps``."""
        if not self.observe <= step <= total - self.settle:
            return False
        return step == self.observe if self.jump_every is None else (step - self.observe) % self.jump_every == 0

    def next_attempt(self, step: int, total: int) -> int | None:
        """Return the first step after ``step`` at which a jump is attempted; None if there is none."""
        later = self.observe
        if step >= self.observe and self.jump_every is not None:
            later = step + self.jump_every - (step - self.observe) % self.jump_every
        return later if later > step and self.attempts(later, total) else None

    def attempt_steps(self, total: int) -> list[int]:
        """Return every step after which a jump is attempted."""
        return [step for step in range(self.observe, total + 1) if self.attempts(step, total)]

    def check_predictor(self, predictor: TrajectoryPredictor, total: int) -> None:
        """Raise ``ConfigError`` if a run of ``total`` steps has no room for a jump, or never enough checkpoints."""
        attempts = self.attempt_steps(total)
        if not attempts:
            raise ConfigError(
                f"no jump would ever happen: observe ({self.observe}) + settle ({self.settle}) exceed the run's "
                f"{total} steps; shorten one of them or train longer",
                kind="config-schedule",
            )
        reasons = [predictor.why_not(range(self.every, step + 1, self.every), self.horizon) for step in attempts]
        if None not in reasons:
            raise ConfigError(
                f"predictor '{predictor.name}' can never act on this schedule; "
                f"after step {attempts[-1]}: {reasons[-1]}",
                kind="config-schedule",
            )


class Guards(Settings):
    """Bounds on a jump. A refused jump is journalled, and training goes on without it."""

    max_norm_ratio: float | None = Field(
        10.0, gt=0, description="Bound on the jump's norm divided by the norm of the motion in the last `horizon` steps"
    )
    time_limit: float | None = Field(
        3600.0, gt=0, description="Seconds a prediction may take; a slower one is stopped, and the jump refused"
    )
    collapse: bool = Field(
        True, description="Step scaling: when the logged reward collapses, return to the last good weights and moments"
    )
    probe: bool = Field(True, description="Measure accuracy before and after each jump, where the backend can")
    max_drop: float = Field(0.2, ge=0, le=1, description="Roll back when accuracy falls by more right after the jump")
    recovery: int | None = Field(
        None, ge=1, description="RL steps after which accuracy is measured again, and the jump rolled back if it fails"
    )
    against: Literal["start", "trend"] = Field(
        "start",
        description="What accuracy must reach after recovery: its value before the jump, or the trend before it",
    )
    tolerance: float = Field(0.02, ge=0, le=1, description="Accuracy that recovery may fall short by (noise)")

    @model_validator(mode="after")
    def _consistent(self) -> Guards:
        if self.recovery is not None and not self.probe:
            raise ValueError("recovery needs probe: true: the recovery is judged by accuracy")
        return self

    def check(self, schedule: Schedule) -> None:
        """Raise ``ConfigError`` if a recovery window could not end before the run does."""
        if self.recovery is not None and schedule.settle < self.recovery:
            raise ConfigError(
                f"settle ({schedule.settle}) must be at least guards.recovery ({self.recovery}): the last jump has to "
                "be judged before the run ends",
                kind="config-schedule",
            )


class LoraSettings(Settings):
    """The trained adapter."""

    rank: int = Field(8, ge=1, description="LoRA rank r")
    alpha: float = Field(16.0, gt=0, description="LoRA alpha; the scaling is alpha / r")
    target_modules: str | list[str] = Field("all-linear", description="Which layers, as PEFT names them")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r)")


class HubDataset(Settings):
    """A dataset of the Hugging Face Hub."""

    name: str = Field(pattern=NAME.pattern, description="owner/name, or owner/name@revision")
    config: str | None = Field(None, description="One of its configs, as `datasets` names it")
    split: str | None = Field(None, description="Such as `train[:1000]`; default: train, validation or test")
    columns: dict[Literal["prompt", "answer"], str] = Field({}, description="Its names of our columns")


class DataSettings(Settings):
    """Prompts with the columns `prompt` and `answer`.

    Each is a file of JSON lines, one object a line, another file that `datasets` reads, or a dataset of the Hub.
    """

    train: Path | HubDataset = Field(description="Prompts to train on")
    validation: Path | HubDataset | None = Field(None, description="Prompts of the probe; default: test")
    test: Path | HubDataset | None = Field(None, description="Prompts of the reported accuracies; default: validation")


class TrainingSettings(Settings):
    """What is trained and how: the same settings for every backend."""

    model: Path = Field(description="Folder of the base model, tokenizer included, or owner/name[@revision] on the Hub")
    algorithm: Literal["grpo", "rloo", "reinforce++"] = Field("grpo", description="The RLVR algorithm")
    lora: LoraSettings | None = Field(LoraSettings(), description="The adapter; null trains all parameters")
    data: DataSettings
    reward: Choice = Field(Choice(name="math-verify"), description="A reward's name, module:Class or module:function")
    learning_rate: float = Field(1e-5, gt=0, description="The optimizer's learning rate, before the scheduler")
    lr_scheduler: str = Field("constant", description="As transformers names it")
    prompts_per_step: int = Field(16, ge=1, description="Different prompts in one RL step")
    generations: int = Field(8, ge=2, description="Roll-outs per prompt")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the roll-outs")
    max_new_tokens: int = Field(256, ge=1, description="Longest completion")
    beta: float = Field(0.0, ge=0, description="Weight of the KL divergence from the reference policy")
    evaluation: Literal["likelihood", "generate"] = Field(
        "likelihood",
        description="Accuracy as the exact probability of `answer` and the end token (for tasks with one right "
        "string), or as the reward of greedy completions",
    )


class RunConfig(Settings):
    """The settings of `next-core run`. Paths are relative to the config file."""

    steps: int = Field(ge=1, le=MOST_STEPS, description="RL steps of the run")
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of the adapter's initial values, the order of the prompts and the samples"
    )
    training: TrainingSettings
    backend: Choice = Field(Choice(name=DEFAULT_BACKEND), description="The trainer")
    predictor: Choice = Field(
        Choice(name=DEFAULT_PREDICTOR), description="Predictor: a name or module:Class, with its settings"
    )
    compressor: Choice | None = Field(
        None, description="How deltas become rank-k factors; none: exact for LoRA, lanczos for full parameters"
    )
    rank: int = Field(1, ge=1, description="Rank k of the factors that a predictor reads")
    executor: Executor = Field(Executor(), description="Where matrices are compressed: local, or ray")
    schedule: Schedule = Schedule()
    guards: Guards = Guards()
    control: Literal["plain", "none"] = Field("none", description="Also run the same seed and steps without jumps")
    save_every: int | None = Field(
        None, ge=1, description="Steps between the trainer's own checkpoints, from which an interrupted run is resumed"
    )
    measure_every: int | None = Field(
        None, ge=1, description="Steps between measurements of both accuracies, for curves"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.guards.check(self.schedule)
        return self

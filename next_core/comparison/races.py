"""Which runs a comparison takes: every variant with every seed, and the steps that several have in common."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from next_core.comparison.comparison_config import LONGER, PLAIN, Arm, CompareConfig, Values
from next_core.plugins import registry
from next_core.run_config import Choice, Guards, RunConfig, Schedule


@dataclass(frozen=True)
class Trunk:
    """The common part of several runs, which branch off at ``stops``; ``folder`` is relative to the comparison's."""

    folder: str
    config: RunConfig = field(repr=False)
    stops: tuple[int, ...]

    def copy(self, stop: int) -> Path:
        """Return where the copy at one of the stops is, relative to the comparison's folder."""
        return Path(self.folder, f"step-{stop:06d}")

    def segment(self, stop: int) -> RunConfig:
        """Return the config of the run that ends at one of the stops."""
        return self.config.model_copy(update={"steps": stop, "save_every": stop})


@dataclass(frozen=True)
class Race:
    """One run. ``folder`` is relative to the comparison's; with a ``trunk`` it branches off at step ``begins``."""

    arm: str
    variant: int
    values: Values
    config: RunConfig = field(repr=False)
    folder: str
    trunk: Trunk | None = field(default=None, repr=False)
    begins: int = 0

    @property
    def title(self) -> str:
        """The arm, the values it chooses among and the seed, for people."""
        chosen = "".join(f", {key.rpartition('.')[2]} {value}" for key, value in self.values.items())
        return f"{self.arm}{chosen}, seed {self.config.seed}"


@dataclass(frozen=True)
class RacePlan:
    """Everything to run."""

    races: tuple[Race, ...]

    @property
    def trunks(self) -> tuple[Trunk, ...]:
        return tuple({race.trunk.folder: race.trunk for race in self.races if race.trunk is not None}.values())

    @property
    def steps(self) -> int:
        return sum(trunk.stops[-1] for trunk in self.trunks) + sum(r.config.steps - r.begins for r in self.races)

    @property
    def shared(self) -> int:
        """How many RL steps sharing saves."""
        return sum(race.config.steps for race in self.races) - self.steps


def make_plan(config: CompareConfig, arms: Sequence[Arm]) -> RacePlan:
    """Plan all runs. The plain run is not run where it is the beginning of the longer one."""
    races: list[Race] = []
    for seed in config.seeds:
        groups: dict[str, list[Race]] = defaultdict(list)
        for race in _races(arms, seed):
            groups[_common_part(race.config) or race.folder].append(race)
        for common, group in groups.items():
            # Its name says what it was trained on: an interrupted call may have had another config.
            digest = hashlib.sha256(common.encode()).hexdigest()[:16]
            races += _branches(group, f"trunks/seed-{seed}-{digest}") if len(group) > 1 else group
    return RacePlan(tuple(races))


def cut_from_longer(arms: Sequence[Arm]) -> bool:
    """Whether the plain run is the beginning of the longer one, measured there: nothing in it depends on the end."""
    longer = next((arm.variants[0].config for arm in arms if arm.name == LONGER), None)
    plain = next(arm.variants[0].config for arm in arms if arm.name == PLAIN)
    measured = plain.steps % (plain.measure_every or 1) == 0
    constant = plain.training.lr_scheduler == "constant" and plain.schedule.average is None
    return longer is not None and measured and constant


def _races(arms: Sequence[Arm], seed: int) -> list[Race]:
    cut, found = cut_from_longer(arms), []
    for arm in arms:
        for index, variant in enumerate(arm.variants):
            place = f"/{index + 1}" if len(arm.variants) > 1 else ""
            if not (arm.name == PLAIN and cut):
                folder = f"races/{arm.name}{place}/seed-{seed}"
                found.append(Race(arm.name, index, variant.values, variant.seeded(seed), folder))
    return found


def _common_part(config: RunConfig) -> str | None:
    """Return what decides a run until it may jump; None for one that must not start from another's copy.

    A trainer with arguments of its own may reuse rollouts over several steps, and then resumes at some of them only.
    """
    exact = registry().get("backend", config.backend.name).exact_resume and not config.backend.fields
    reads_logs = "metrics" in registry().get("predictor", config.predictor.name).requires  # a trunk logs where it ends
    probes_before = config.guards.against == "trend"
    too_short = config.schedule.observe <= config.schedule.every
    if not exact or reads_logs or probes_before or too_short or config.training.lr_scheduler != "constant":
        return None
    same = {"training", "backend", "measure_every"}
    return json.dumps([config.model_dump(mode="json", include=same), config.schedule.every], sort_keys=True)


def _branches(races: Sequence[Race], folder: str) -> list[Race]:
    """Let races branch off from one trunk, each at the step before its first checkpoint that may see a jump."""
    model = races[0].config
    every = model.schedule.every
    schedule = Schedule(observe=every, every=every, horizon=every)
    stay = {"predictor": Choice(name="stay"), "schedule": schedule, "guards": Guards(probe=False)}
    begins = [race.config.schedule.observe - 1 for race in races]
    trunk = Trunk(folder, model.model_copy(update=stay), tuple(sorted(set(begins))))
    found = []
    for race, begin in zip(races, begins, strict=True):
        # A race that branches off is a resumed run, and only runs with `save_every` resume.
        config = race.config.model_copy(update={"save_every": race.config.save_every or race.config.steps})
        found.append(replace(race, config=config, trunk=trunk, begins=begin))
    return found

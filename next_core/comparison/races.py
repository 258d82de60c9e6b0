"""Which runs a comparison takes: every variant with every seed, and the prefixes that several have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from next_core.comparison.comparison_config import LONGER, PLAIN, Arm, CompareConfig, Values
from next_core.plugins import registry
from next_core.run_config import Choice, Guards, RunConfig, Schedule


@dataclass(frozen=True)
class Race:
    """One run. ``folder`` is relative to the comparison's.

    ``begins`` is the step up to which a trunk serves it: the one before its first checkpoint that may see a jump.
    """

    arm: str
    variant: int
    values: Values
    config: RunConfig = field(repr=False)
    folder: str
    begins: int = 0

    @property
    def title(self) -> str:
        """For people: the arm, what is chosen, the seed."""
        chosen = "".join(f", {key.rpartition('.')[2]} {value}" for key, value in self.values.items())
        return f"{self.arm}{chosen}, seed {self.config.seed}"


@dataclass(frozen=True)
class Trunk:
    """A plain run that goes as far as several races are alike: none of them has jumped yet.

    ``stops`` are the steps at which a race branches off. ``plain`` is the race that the trunk itself is, if any.
    """

    config: RunConfig = field(repr=False)
    stops: tuple[int, ...]
    folder: str
    races: tuple[Race, ...]
    plain: Race | None = None

    @property
    def steps(self) -> int:
        """RL steps that it takes."""
        return self.stops[-1]

    @property
    def serves(self) -> tuple[Race, ...]:
        """Itself, if it is a race, and those that branch off."""
        return self.races if self.plain is None else (self.plain, *self.races)

    def segment(self, stop: int) -> RunConfig:
        """The run that ends at one of the stops."""
        return self.config.model_copy(update={"steps": stop, "save_every": stop})


@dataclass(frozen=True)
class RacePlan:
    """Everything to run. ``alone`` are the races that begin at step 0."""

    trunks: tuple[Trunk, ...]
    alone: tuple[Race, ...]

    @property
    def races(self) -> tuple[Race, ...]:
        """All of them, those that are a trunk themselves included."""
        return (*self.alone, *(race for trunk in self.trunks for race in trunk.serves))

    @property
    def steps(self) -> int:
        """RL steps that are run."""
        branches = sum(race.config.steps - race.begins for trunk in self.trunks for race in trunk.races)
        return sum(race.config.steps for race in self.alone) + sum(trunk.steps for trunk in self.trunks) + branches

    @property
    def shared(self) -> int:
        """RL steps that sharing saves."""
        return sum(race.config.steps for race in self.races) - self.steps


def make_plan(config: CompareConfig, arms: Sequence[Arm]) -> RacePlan:
    """All races; with a constant learning rate the plain run is a part of the longer one, and is not run."""
    trunks: list[Trunk] = []
    alone: list[Race] = []
    for seed in config.seeds:
        groups: dict[str, list[Race]] = {}
        for race in _races(arms, seed):
            key = _shares_with(race.config)
            groups.setdefault(key if key is not None else f"alone {race.folder}", []).append(race)
        for number, group in enumerate(groups.values(), start=1):
            name = PLAIN if config.longer is None else LONGER
            plain = next((race for race in group if race.arm == name and _knows_no_end(race.config)), None)
            others = tuple(race for race in group if race is not plain)
            if len(group) < 2:
                alone += group
            else:
                trunks.append(_trunk(seed, number, plain, others))
    return RacePlan(tuple(trunks), tuple(alone))


def cut_from_longer(arms: Sequence[Arm]) -> bool:
    """Whether the plain run is the beginning of the longer one, measured there: nothing in it knows the end."""
    longer = next((arm.variants[0].config for arm in arms if arm.name == LONGER), None)
    plain = next(arm.variants[0].config for arm in arms if arm.name == PLAIN)
    measured = plain.steps % (plain.measure_every or 1) == 0
    return longer is not None and measured and _knows_no_end(longer)


def _knows_no_end(config: RunConfig) -> bool:
    return config.training.lr_scheduler == "constant" and config.schedule.average is None


def _races(arms: Sequence[Arm], seed: int) -> list[Race]:
    found = []
    cut = cut_from_longer(arms)
    for arm in arms:
        if arm.name == PLAIN and cut:
            continue
        for index, variant in enumerate(arm.variants):
            place = f"/{index + 1}" if len(arm.variants) > 1 else ""
            folder = f"races/{arm.name}{place}/seed-{seed}"
            found.append(Race(arm.name, index, variant.values, variant.seeded(seed), folder))
    return found


def _shares_with(config: RunConfig) -> str | None:
    """Equal for runs that are the same until one of them jumps; None for one that shares with nobody.

    A trainer with arguments of its own may reuse roll-outs over several steps, and then resumes at some of them only.
    """
    exact = registry().get("backend", config.backend.name).exact_resume and not config.backend.fields
    reads_logs = "metrics" in registry().get("predictor", config.predictor.name).requires  # a trunk logs where it ends
    probes_before = config.guards.against == "trend"
    too_short = config.schedule.observe <= config.schedule.every
    if not exact or reads_logs or probes_before or too_short or config.training.lr_scheduler != "constant":
        return None
    same = {"training", "backend", "measure_every"}
    return json.dumps([config.model_dump(mode="json", include=same), config.schedule.every], sort_keys=True)


def _trunk(seed: int, number: int, plain: Race | None, others: tuple[Race, ...]) -> Trunk:
    races = tuple(
        replace(race, config=_resumable(race.config), begins=race.config.schedule.observe - 1) for race in others
    )
    stops = {race.begins for race in races} | ({plain.config.steps} if plain is not None else set())
    model = others[0].config
    every = model.schedule.every
    schedule = Schedule(observe=every, every=every, horizon=every)
    config = model.model_copy(
        update={
            "predictor": Choice(name="stay"),
            "schedule": schedule,
            "guards": Guards(probe=False),
            "save_every": None,
        }
    )
    return Trunk(config, tuple(sorted(stops)), f"trunks/seed-{seed}-{number}", races, plain)


def _resumable(config: RunConfig) -> RunConfig:
    """A race that branches off is a run that is resumed, which asks for ``save_every``."""
    return config if config.save_every is not None else config.model_copy(update={"save_every": config.steps})

"""What a schedule and the trainer's arguments must have in common."""

from __future__ import annotations

import math
from typing import Any

from next_core.cycle.guards import Guards
from next_core.cycle.schedule import Schedule
from next_core.errors import BackendError, ConfigError


def check_arguments(schedule: Schedule, guards: Guards, total: int, args: Any) -> None:
    """Raise ``ConfigError`` or ``BackendError`` before training for what would go wrong in it.

    TRL generates once every ``steps_per_generation * num_iterations`` micro-batches; weights that change in between
    would train on roll-outs, and on log-probabilities, of weights that are gone.
    """
    if args.world_size > 1:
        raise BackendError(f"{args.world_size} processes: jumps are made in one-process runs only, so far")
    schedule.check(total)
    guards.check(schedule)
    reuse = args.steps_per_generation * args.num_iterations
    unit = reuse // math.gcd(reuse, args.gradient_accumulation_steps)
    for step in schedule.attempt_steps(total):
        for change, what in ((step, "observe and jump_every"), (step + (guards.recovery or 0), "guards.recovery")):
            if change % unit:
                raise ConfigError(
                    f"weights would change after step {change}, inside a generation that serves {unit} steps; make "
                    f"{what} multiples of {unit}"
                )

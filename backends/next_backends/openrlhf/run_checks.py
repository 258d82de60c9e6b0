"""What the trainer cannot do as a run config asks, said before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from next_backends.openrlhf.known_options import check_extra
from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_core.errors import ConfigError

if TYPE_CHECKING:
    from next_core.run_config import RunConfig

MOST_RESTARTS = 20
"""Beyond this many, starting the trainer anew would take longer than jumping saves."""


def check_run(run: RunConfig, config: OpenRlhfConfig) -> None:
    """Raise ``ConfigError`` for what OpenRLHF, or this way of going on from a jump, does not have."""
    if config.jump != "merge" and config.ray.address is not None:
        raise ConfigError(
            f"backend.ray.address: with jump: {config.jump} the trainer has to run on this machine; leave the address "
            "out, for a Ray of the trainer's own"
        )
    if run.training.evaluation == "likelihood" and check_extra(config).get("--ds.ring_attn_size", 1) > 1:
        raise ConfigError("training.evaluation: likelihood is not computed on rings; set generate")
    restarts = 0 if config.jump == "swap" else min(len(run.schedule.attempt_steps(run.steps)), run.schedule.limit)
    if restarts > MOST_RESTARTS:
        raise ConfigError(
            f"backend.jump: {config.jump} starts the trainer anew at each of the {restarts} jumps of this schedule, a "
            "minute each; use swap, or a predictor and a schedule with fewer jumps"
        )
    if config.jump == "merge":
        for key, asked in (("measure_every", run.measure_every), ("schedule.average", run.schedule.average)):
            if asked is not None:
                raise ConfigError(f"{key}: with backend.jump: merge nothing measures accuracy; use swap or restart")
        if run.training.lora is not None:
            raise ConfigError(
                "backend.jump: merge is for full-parameter runs: LoRA needs a hook into OpenRLHF in any case (its "
                "issue 1349); use swap or restart"
            )
        if run.training.lr_scheduler != "constant":
            raise ConfigError(
                f"backend.jump: merge begins the schedule '{run.training.lr_scheduler}' anew with each jump; use swap "
                "or restart, or lr_scheduler: constant"
            )
        if run.guards.recovery is not None:
            raise ConfigError(
                "guards.recovery: with backend.jump: merge nothing measures accuracy; use swap or restart"
            )

"""The rewards that a trainer logs, with their standard errors."""

import math
from collections.abc import Mapping
from typing import Any

from next_core.backend import LoggedReward


class LoggedRewards(list[LoggedReward]):
    """The rewards of a run so far, in order."""

    def add(self, step: int, logs: Mapping[str, Any], args: Any) -> None:
        """Take the mean reward since the last one from ``logs``, if there is one; ``args`` are the trainer's."""
        mean, spread = logs.get("reward"), logs.get("reward_std")
        steps = step - (self[-1].step if self else 0)
        if not isinstance(mean, int | float) or not isinstance(spread, int | float) or steps < 1:
            return
        if not (math.isfinite(mean) and math.isfinite(spread)):  # no roll-out of a step had a reward
            return
        a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        count = a_step * args.world_size * steps / getattr(args, "num_iterations", 1)
        self.append(LoggedReward(step, steps, float(mean), float(spread) / math.sqrt(count)))

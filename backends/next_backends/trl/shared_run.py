"""A data-parallel run: process 0 watches and jumps, and the others repeat what it did to its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from next_backends.trl.processes import Processes
from next_backends.trl.repeated_change import Change, adapters, check_same_weights, repeat
from next_backends.trl.trl_backend import TrlBackend
from next_core.live_weights.in_memory import activate_jumps, is_peft
from next_core.run_config import Guards


class SharedRun:
    """The events of a training, in every process. Each method is called by all of them at the same point."""

    def __init__(self, args: Any, backend: TrlBackend, model: nn.Module, optimizer: Any) -> None:
        self._backend, self._model, self._optimizer = backend, model, optimizer
        self._processes = Processes(args.process_index, args.world_size, args.ddp_timeout)
        self._late: Exception | None = None
        """An error of process 0 at an event where the others were not waiting for it."""

    def bounded(self, guards: Guards) -> Guards:
        """Return guards whose time limit ends a slow fit before the other processes stop waiting for it.

        They wait for the fit and the probes together.
        """
        half = self._processes.timeout / 2
        return guards.model_copy(update={"time_limit": min(guards.time_limit or half, half)})

    def begin(self, step: int, settings: Mapping[str, Any], act: Callable[..., None], *arguments: Any) -> None:
        """Let process 0 ``act``, and check that all processes have the same settings and weights."""
        self._processes.check_settings(settings)
        self._processes.first("when training began", act, *arguments)
        if self._backend.follows_steps:
            self._follow_steps()
        if not self._processes.leads and is_peft(self._model):
            activate_jumps(self._model)  # of a resumed run; process 0 has done so
        check_same_weights(self._processes, self._model, f"when training began at step {step}")

    def _follow_steps(self) -> None:
        """Multiply the steps of every process as process 0 does, from what a resumed run had reached."""
        if not self._processes.leads:
            self._backend.repeat_steps(self._optimizer)
        multiple = self._processes.gather(self._backend.steps.multiple, "when training began")[0]
        self._backend.steps.multiple = multiple

    def end_step(self, step: int, observes: bool, act: Callable[[int], None]) -> None:
        """Let process 0 ``act``, and repeat in the others what that changed."""
        where = f"after step {step}"
        if observes:
            check_same_weights(self._processes, self._model, where)
        change = self._processes.first(where, self._change, act, step)
        if change.multiple is not None:
            self._backend.steps.multiple = change.multiple
        if change.moved:
            repeat(self._processes, change, self._model, self._optimizer, where)

    def _change(self, act: Callable[[int], None], step: int) -> Change:
        """In process 0: act, and return what that changed in the model and the optimizer."""
        before = adapters(self._model)
        self._backend.moved.clear()
        self._raise_late()
        act(step)
        multiple = self._backend.steps.multiple if self._backend.follows_steps else None
        return Change.since(before, self._model, self._optimizer, self._backend.moved, multiple)

    def log(self, step: int, logs: Mapping[str, Any]) -> None:
        """Write the metrics in process 0. An error is raised at the next event where the others can learn of it."""
        if self._processes.leads:
            try:
                self._backend.log(step, logs)
            except Exception as error:
                self._late = error

    def save(self, step: int, checkpoint: Path) -> None:
        """Seal the trainer's checkpoint when every process has written its part."""
        where = f"at the checkpoint of step {step}"
        self._processes.barrier(where)
        self._processes.first(where, self._unless_late, self._backend.saved, checkpoint)

    def end(self) -> None:
        """Wait in process 0 for what is being written, and in the others for process 0."""
        self._backend.close_steps()
        self._processes.first("when training ended", self._unless_late, self._backend.flush)
        self.close()

    def close(self) -> None:
        """Stop talking to the other processes."""
        self._processes.close()

    def _unless_late(self, act: Callable[..., None], *arguments: Any) -> None:
        self._raise_late()
        act(*arguments)

    def _raise_late(self) -> None:
        if self._late is not None:
            raise self._late

"""A run of several processes: process 0 watches and decides, and the others carry out their part."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from next_backends.trl.drift import check_same_weights
from next_backends.trl.trl_backend import TrlBackend
from next_core.live_weights.processes import Processes
from next_core.run_config import Guards


class SharedRun:
    """The events of a training, in every process. Each method is called by all of them at the same point."""

    def __init__(self, args: Any, backend: TrlBackend, model: nn.Module) -> None:
        self._backend, self._model = backend, model
        self.processes = Processes(args.process_index, args.world_size, args.ddp_timeout)
        self._late: Exception | None = None
        """An error of process 0 at an event where the others were not waiting for it."""

    def bounded(self, guards: Guards) -> Guards:
        """Return guards whose time limit ends a slow fit before the other processes stop waiting for it.

        They wait for the fit and the probes together.
        """
        half = self.processes.timeout / 2
        return guards.model_copy(update={"time_limit": min(guards.time_limit or half, half)})

    def begin(self, step: int, settings: Mapping[str, Any], act: Callable[..., None], *arguments: Any) -> None:
        """Let process 0 ``act``, and check that all processes have the same settings and weights."""
        where = "when training began"
        self.processes.check_settings(settings)
        self.processes.lead(where, act, *arguments)
        self._share_multiple(self.processes.lead(where, self._multiple))
        check_same_weights(self.processes, self._model, f"{where} at step {step}")

    def end_step(self, step: int, observes: bool, act: Callable[[int], None]) -> None:
        """Let process 0 ``act``; the others take part in what that reads or changes."""
        where = f"after step {step}"
        if observes:
            check_same_weights(self.processes, self._model, where)
        if not self.processes.leads and self._backend.follows_steps:
            self._backend.steps.after_step()
        self._share_multiple(self.processes.lead(where, self._end_step, act, step))

    def _end_step(self, act: Callable[[int], None], step: int) -> float | None:
        self._raise_late()
        act(step)
        return self._multiple()

    def _multiple(self) -> float | None:
        """Return the multiple of the steps that follow; None without step scaling."""
        return self._backend.steps.multiple if self._backend.follows_steps else None

    def _share_multiple(self, multiple: float | None) -> None:
        if multiple is not None:
            self._backend.steps.multiple = multiple

    def log(self, step: int, logs: Mapping[str, Any]) -> None:
        """Write the metrics in process 0. An error is raised at the next event where the others can learn of it."""
        if self.processes.leads:
            try:
                self._backend.log(step, logs)
            except Exception as error:
                self._late = error

    def save(self, step: int, checkpoint: Path) -> None:
        """Seal the trainer's checkpoint when every process has written its part."""
        where = f"at the checkpoint of step {step}"
        self.processes.gather(None, where)
        self.processes.lead(where, self._unless_late, self._backend.saved, checkpoint)

    def end(self) -> None:
        """Wait in process 0 for what is being written, and in the others for process 0."""
        try:
            self.processes.lead("when training ended", self._unless_late, self._backend.flush)
        finally:
            self._backend.close_steps()
        self.processes.close()

    def _unless_late(self, act: Callable[..., None], *arguments: Any) -> None:
        self._raise_late()
        act(*arguments)

    def _raise_late(self) -> None:
        if self._late is not None:
            raise self._late

"""One running OpenRLHF: ``Trainer`` trains by itself, ``ControlledTrainer`` pauses when told to and takes requests."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from next_backends.openrlhf.control_socket import ControlSocket
from next_backends.openrlhf.log import LogReader
from next_backends.openrlhf.trainer_setup import LOG, TrainerSetup
from next_core.errors import BackendError

TICK = 0.05
"""Seconds between looks at the trainer."""
START_TIMEOUT = 3600.0
"""Seconds for a trainer to get ready: large models take long to load."""
END_TIMEOUT = 1800.0
"""Seconds for its last save and the end of its processes."""
LAST_WORDS = 20.0
"""Seconds for a trainer that hung up to end and log the reason."""


class Trainer:
    """A trainer process. While we wait for it, its rewards are served."""

    def __init__(self, setup: TrainerSetup, options: Sequence[str], hooks: Sequence[str] = (), offset: int = 0) -> None:
        """Start it with these options and hooks. ``offset`` is added to the steps that it logs."""
        self._setup, self._offset = setup, offset
        self._log = LogReader(setup.folder / LOG)
        with contextlib.ExitStack() as undo:
            scratch = Path(tempfile.mkdtemp(prefix="next-core-"))  # short, as the paths of Ray's sockets have a limit
            undo.callback(shutil.rmtree, scratch, ignore_errors=True)
            control = self._open_control(scratch, undo)
            self.process = setup.launch(scratch, options, hooks, control)
            undo.pop_all()

    def wait(self) -> None:
        """Serve rewards for a moment."""
        if self._setup.rewards is not None:
            self._setup.rewards.serve(TICK)
        else:
            time.sleep(TICK)

    def read_log(self) -> None:
        """Report the steps logged since the last call."""
        for step in self._log.read():
            self._setup.step_logged(self._offset + step.number, step.metrics)

    def wait_for_end(self, timeout: float = float("inf")) -> None:
        """Wait until it has ended by itself. Raises ``BackendError`` if it failed or takes too long."""
        deadline = time.monotonic() + timeout
        while self.process.running:
            self.wait()
            if time.monotonic() > deadline:
                raise BackendError(
                    f"the trainer does not end; its log: {self.process.log}", kind="backend-process-lost"
                )
        self.process.check()

    def kill(self) -> None:
        """End all that is left of it."""
        self.process.stop()

    def _open_control(self, scratch: Path, undo: contextlib.ExitStack) -> dict[str, Any] | None:
        return None


class ControlledTrainer(Trainer):
    """A trainer under control. Any call raises ``BackendError`` with the trainer's last lines when it fails."""

    def __init__(self, setup: TrainerSetup, start: int, load: bool = False) -> None:
        """Start it; it pauses before its first step. With ``load`` it resumes from its own newest checkpoint."""
        self.step, self.paused = start, False
        self._requests = 0
        self._new_weights = True
        """Whether the engines got weights since the last step."""
        hooks = ["control", "lora"] if setup.run.training.lora is not None else ["control"]
        super().__init__(setup, setup.options(start, load=load), hooks)
        try:
            self.step = self._wait_for_pause(time.monotonic() + START_TIMEOUT)
        except BaseException:
            self.kill()
            raise

    def train(self, until: int) -> None:
        """Train up to and including step ``until``, and pause there."""
        self.paused = False
        self._send({"do": "train", "until": until})
        self.step = self._wait_for_pause()
        if self.step != until:
            raise BackendError(f"the trainer paused after step {self.step}, not {until}", kind="backend-failed")

    def ask(self, what: str, **request: Any) -> Any:
        """Have the paused trainer do something. Raises ``BackendError`` with its reason if it cannot."""
        self._requests += 1
        self._send({"do": what, "number": self._requests, **request})
        answer = self._message()
        while answer.get("number") != self._requests:  # answers an earlier request that failed on our side
            answer = self._message()
        self._new_weights = self._new_weights or what == "load"
        if "error" in answer:
            raise BackendError(f"the trainer failed to do '{what}': {answer['error']}", kind="backend-failed")
        return answer.get("value")

    def finish(self) -> None:
        """Let the paused trainer save its model and end by itself."""
        try:
            self._send({"do": "stop"})
            self.wait_for_end(END_TIMEOUT)
        finally:
            self.kill()

    def kill(self) -> None:
        try:
            super().kill()
        finally:
            self._socket.close()

    def _open_control(self, scratch: Path, undo: contextlib.ExitStack) -> dict[str, Any]:
        self._socket = ControlSocket(scratch)
        undo.callback(self._socket.close)
        return {
            "address": self._socket.address,
            "key": self._socket.key,
            "start": self.step,
            "seed": self._setup.run.seed + self.step,
            "scheduler_steps": self._setup.run.steps * self._setup.updates,
        }

    def _wait_for_pause(self, deadline: float = float("inf")) -> int:
        while True:
            message = self._message(deadline)
            if "paused" in message:
                self.paused = True
                return int(message["paused"])
            if "step" in message:
                self._setup.step_logged(int(message["step"]), message["metrics"], check=self._new_weights)
                self._new_weights = False

    def _message(self, deadline: float = float("inf")) -> dict[str, Any]:
        while True:
            ended = not self.process.running  # asked first: the last message may come just before the end
            try:
                message = self._socket.receive()
            except BackendError as error:
                raise self._lost(error) from None
            if message is not None:
                return message
            if ended:
                self.process.check("while it was needed")
            if time.monotonic() > deadline:
                raise BackendError(
                    f"the trainer was not ready in time; its log: {self.process.log}", kind="backend-process-lost"
                )
            self.wait()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._socket.send(message)
        except BackendError as error:
            raise self._lost(error) from None

    def _lost(self, error: BackendError) -> BackendError:
        """Wait for the end of a trainer that hung up, and raise or return the best explanation."""
        with contextlib.suppress(BackendError):
            self.wait_for_end(LAST_WORDS)
        self.process.check("while it was needed")
        return BackendError(f"{error.message}; its log: {self.process.log}", kind=error.kind)

"""A trainer process that pauses after the steps it is told, and then does what it is asked."""

from __future__ import annotations

import time
from typing import Any

from next_backends.openrlhf.control_socket import ControlSocket
from next_backends.openrlhf.trainer_setup import LOG, TICK, TrainerSetup
from next_core.errors import BackendError

START_TIMEOUT = 3600.0
"""Seconds in which a trainer has to get ready: large models load for long."""
END_TIMEOUT = 1800.0
"""Seconds for its last save and the end of its processes."""
LAST_WORDS = 20.0
"""Seconds for a trainer that hung up to end and say why."""
MEASURES = ("likelihood", "greedy")


class LiveTrainer:
    """One process under control. Raises ``BackendError`` with its last lines, from any call, when it fails."""

    def __init__(self, setting: TrainerSetup, start: int, load: bool = False) -> None:
        """Start it; it pauses before its first step. ``load``: it takes up its own newest checkpoint."""
        self._setting, self._channel = setting, ControlSocket()
        self.paused = False
        self._asked = 0
        self._loaded = True
        """Whether weights came to the engines since the last step."""
        control = {
            "address": self._channel.address,
            "key": self._channel.key,
            "start": start,
            "seed": setting.run.seed + start,
            "scheduler_steps": setting.run.steps * setting.updates,
        }
        lora = setting.run.training.lora is not None
        try:
            options = setting.options(start, load=load)
            self._watch = setting.start(options, ["control", "lora"] if lora else ["control"], control)
        except BaseException:
            self._channel.close()
            raise
        try:
            self.step = self._wait_for_pause(time.monotonic() + START_TIMEOUT)
        except BaseException:
            self.kill()
            raise

    def train(self, until: int) -> None:
        """Train up to and including step ``until``, and pause there."""
        self.paused = False
        self._channel.send({"do": "train", "until": until})
        self.step = self._wait_for_pause()
        if self.step != until:
            raise BackendError(f"the trainer paused after step {self.step}, not {until}")

    def ask(self, what: str, **request: Any) -> Any:
        """Have the paused trainer do something. Raises ``BackendError`` with its reason when it cannot."""
        self._asked += 1
        self._channel.send({"do": what, "number": self._asked, **request})
        answer = self._message()
        while answer.get("number") != self._asked:  # of an earlier request, whose answer nobody waited for
            answer = self._message()
        self._loaded = self._loaded or what == "load"
        if "error" in answer:
            doing = "measure accuracy" if what in MEASURES else what.replace("_", " ")
            raise BackendError(f"the trainer could not {doing}: {answer['error']}")
        return answer.get("value")

    def finish(self) -> None:
        """Let the paused trainer save its model and end by itself."""
        try:
            self._channel.send({"do": "stop"})
            self._watch.end(time.monotonic() + END_TIMEOUT)
        finally:
            self.kill()

    def kill(self) -> None:
        """End whatever is left of it."""
        try:
            self._watch.process.stop()
        finally:
            self._channel.close()

    def _wait_for_pause(self, deadline: float | None = None) -> int:
        while True:
            message = self._message(deadline)
            if "paused" in message:
                self.paused = True
                return int(message["paused"])
            if "step" in message:
                self._setting.logged(int(message["step"]), message["metrics"], check=self._loaded)
                self._loaded = False

    def _message(self, deadline: float | None = None) -> dict[str, Any]:
        process = self._watch.process
        while True:
            ended = not process.running
            try:
                message = self._channel.receive()
            except BackendError:
                end = time.monotonic() + LAST_WORDS
                while process.running and time.monotonic() < end:
                    time.sleep(TICK)
                process.check("while it was needed")
                raise BackendError(f"the trainer has hung up; its log: {self._setting.folder / LOG}") from None
            if message is not None:
                return message
            if ended:
                process.check("while it was needed")
            if deadline is not None and time.monotonic() > deadline:
                raise BackendError(f"the trainer was not ready in time; its log: {self._setting.folder / LOG}")
            self._watch.look()

"""One running trainer, which trains until it is to pause, and then takes requests."""

import contextlib
import json
import shutil
import socket
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from next_backends.external.trainer_setup import TrainerSetup
from next_core.errors import BackendError, trainer_failed, trainer_lost

TICK = 0.05  # Seconds between looks at the trainer
START_TIMEOUT = 3600.0  # Seconds for a trainer to get ready: large models take long to load
END_TIMEOUT = 1800.0  # Seconds for its last save and the end of its processes
LAST_WORDS = 20.0  # Seconds for a trainer that hung up to end and log the reason
LONGEST = 2**20  # Bytes of one message of the trainer: answers are figures, never weights


class Trainer:
    """A trainer process, which calls us through a Unix socket.

    Only processes of the same user reach the socket, as its folder is closed to others. Messages are JSON, framed by
    multiprocessing and never unpickled. Any call raises ``BackendError`` with the trainer's last lines when it fails.
    """

    def __init__(self, setup: TrainerSetup, start: int, load: bool = False) -> None:
        """Start it; it pauses before its first step. With ``load`` it resumes from its own newest checkpoint."""
        self.step, self.paused = start, False
        self._setup = setup
        self._requests = 0
        self._new_weights = True  # Whether the engines got weights since the last step
        scratch = Path(tempfile.mkdtemp(prefix="next-core-"))  # short, as the paths of sockets have a limit
        self._caller: Connection | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        try:
            self._listener.bind(str(scratch / "control"))
            self._listener.listen()
            self.process = setup.launch(scratch, self._listener.getsockname(), start, load)
        except BaseException:
            self._listener.close()
            shutil.rmtree(scratch, ignore_errors=True)
            raise
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
            raise trainer_failed(f"the trainer paused after step {self.step}, not {until}")

    def ask(self, what: str, **request: Any) -> Any:
        """Have the paused trainer do something. Raises ``BackendError`` with its reason if it cannot."""
        self._requests += 1
        self._send({"do": what, "number": self._requests, **request})
        answer = self._message()
        while answer.get("number") != self._requests:  # answers an earlier request that failed on our side
            answer = self._message()
        self._new_weights = self._new_weights or what in ("load", "restore", "move")
        if "error" in answer:
            raise trainer_failed(f"the trainer failed to do '{what}': {answer['error']}")
        return answer.get("value")

    def finish(self) -> None:
        """Let the paused trainer save its model and end by itself."""
        try:
            self._send({"do": "stop"})
            self._wait_for_end(END_TIMEOUT)
        finally:
            self.kill()

    def kill(self) -> None:
        """End all that is left of it."""
        try:
            self.process.stop()
        finally:
            self._listener.close()
            if self._caller is not None:
                self._caller.close()

    def _wait(self, *sources: Any) -> None:
        """Wait a moment, or until a source can be read. Raises ``BackendError`` if the reward has failed."""
        rewards = self._setup.rewards
        wait([*sources, *([] if rewards is None else [rewards.connection])], TICK)
        if rewards is not None:
            rewards.check()

    def _wait_for_end(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self.process.running:
            self._wait()
            if time.monotonic() > deadline:
                raise trainer_lost(f"the trainer does not end; its log: {self.process.log}")
        self.process.check()

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
                message = self._receive()
            except (EOFError, OSError) as error:
                raise self._lost(error) from None
            if message is not None:
                return message
            if ended:
                self.process.check("while it was needed")
            if time.monotonic() > deadline:
                raise trainer_lost(f"the trainer was not ready in time; its log: {self.process.log}")
            self._wait(self._caller or self._listener)

    def _receive(self) -> dict[str, Any] | None:
        """Return the next message, or None if there is none yet. The first caller is the trainer."""
        if self._caller is None:
            try:
                self._caller = Connection(self._listener.accept()[0].detach())
            except BlockingIOError:
                return None
        if not self._caller.poll():
            return None
        message: dict[str, Any] = json.loads(self._caller.recv_bytes(LONGEST))
        return message

    def _send(self, message: dict[str, Any]) -> None:
        assert self._caller is not None  # it has paused
        try:
            self._caller.send_bytes(json.dumps(message).encode())
        except OSError as error:
            raise self._lost(error) from None

    def _lost(self, error: EOFError | OSError) -> BackendError:
        """Wait for the end of a trainer that hung up, and raise or return the best explanation."""
        with contextlib.suppress(BackendError):
            self._wait_for_end(LAST_WORDS)
        self.process.check("while it was needed")
        return trainer_lost(f"the trainer has hung up ({error or 'end of file'}); its log: {self.process.log}")

"""The trainer's end of the connection to next-core: it pauses, and answers requests until training is to continue.

Needs the standard library only, so next-core's tests run it without a trainer.
"""

import json
from multiprocessing.connection import Client
from typing import Any

MOVES = ("load", "restore", "move")  # Methods of ``Policy`` after which the engines need its weights


class ControlClient:
    """Answers requests; ``until`` is the step after which to pause again."""

    def __init__(self, address: str) -> None:
        self.until = 0
        self._connection = Client(address, "AF_UNIX")

    def pause(self, step: int) -> None:
        """Report the pause, and answer requests until training is to continue or to end.

        Raises ``EOFError`` when next-core has ended: the run then ends, too.
        """
        self._send({"paused": step})
        while True:
            request = json.loads(self._connection.recv_bytes())
            what, number = request.pop("do"), request.pop("number", None)
            if what == "train":
                self.until = request["until"]
                return
            if what == "stop":
                self.end_run()
                return
            try:
                answer = {"value": self.answer(what, request)}
            except Exception as error:
                cause = getattr(error, "cause", None) or error  # Ray's own error holds a whole traceback
                answer = {"error": f"{type(cause).__name__}: {cause}"}
            self._send({**answer, "number": number})

    def answer(self, what: str, request: dict[str, Any]) -> Any:
        """Do what was asked, and return a value that JSON can hold."""
        raise NotImplementedError

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of a step that ended."""
        self._send({"step": step, "metrics": metrics})

    def end_run(self) -> None:
        """Let the training loop end after this pause."""
        raise NotImplementedError

    def _send(self, message: dict[str, Any]) -> None:
        self._connection.send_bytes(json.dumps(message).encode())

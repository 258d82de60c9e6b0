"""What the processes do: a run from a config, or one through the callback, and at which point they end themselves."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 - what a run imports on its way is imported by the server that forks it
import math_verify  # noqa: F401
import transformers.models.qwen2.modeling_qwen2  # noqa: F401
from peft import LoraConfig  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
from trl import GRPOTrainer, RLOOTrainer  # noqa: F401

from next_backends.trl import PredictExtendCallback
from next_backends.trl.build import build_trainer, last_checkpoint
from next_core.cycle.run import run
from next_core.process.quiet import quiet_libraries
from next_core.storage import atomic as storage
from tests.crash import small_run

Action = Callable[[], None]


@dataclass(frozen=True)
class Point:
    """A failpoint of one run: what is done to which path below the folder beside the run, and for which time."""

    what: str
    path: str
    time: int

    @property
    def kind(self) -> tuple[str, str]:
        """Points of one kind differ in a number, or in the time."""
        return self.what, re.sub(r"\d+", "N", self.path)


class Points:
    """Stands in for ``storage.failpoint``: keeps what was passed, and does something at one point."""

    def __init__(self, folder: Path, at: Point | None, action: Action) -> None:
        self._folder, self._at, self._action = folder, at, action
        self._times: Counter[tuple[str, str]] = Counter()
        self._one = threading.Lock()  # checkpoints are written by a thread
        self.passed: list[Point] = []

    def __call__(self, what: str, path: Path) -> None:
        # A scratch name has the number of its process.
        name = re.sub(r"\.([^/]+)\.(tmp|old)-\d+", r"\1 (\2)", os.path.relpath(path, self._folder))
        with self._one:
            self._times[what, name] += 1
            point = Point(what, name, self._times[what, name])
            self.passed.append(point)
        if point == self._at:
            self._action()


kill, interrupt, terminate = (partial(signal.raise_signal, s) for s in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
"""A power cut that leaves what was written; Ctrl-C; what a scheduler ends a job with."""


@dataclass(frozen=True)
class Fill:
    """Leave no space on the disk of a folder."""

    ballast: Path

    def __call__(self) -> None:
        with self.ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))


@dataclass(frozen=True)
class Remount:
    """From now on nothing can be written to a disk."""

    disk: Path

    def __call__(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.disk], check=True)


@dataclass(frozen=True)
class Pause:
    """Wait until a file is there; another one says that it waits."""

    waiting: Path
    until: Path

    def __call__(self) -> None:
        self.waiting.touch()
        while not self.until.exists():
            time.sleep(0.02)


@dataclass(frozen=True)
class Trained:
    """What a process did: the failpoints it passed, and how long it took."""

    points: list[Point]
    seconds: float


def go(way: str, raw: dict[str, Any], out: Path, at: Point | None = None, action: Action = kill) -> Trained:
    """The command that is killed and given again, to its end: ``run``, ``callback``, or the command line's."""
    quiet_libraries()
    points = storage.failpoint = Points(out.parent, at, action)
    started = time.perf_counter()
    if way == "run":
        run(small_run.checked(raw), out)
    elif way == "callback":
        train_with_callback(raw, out)
    else:
        command(["run", way, "--out", str(out)], Path(f"{way}.said"))
    return Trained(points.passed, time.perf_counter() - started)


def train_with_callback(raw: dict[str, Any], out: Path) -> None:
    """A user's script: the trainer, the callback, and on from the newest checkpoint that is whole."""
    config = small_run.checked(raw)
    trainer, evaluate = build_trainer(config, small_run.LOGGED, out)
    newest, step, _ = last_checkpoint(out)
    if step == config.steps:
        return
    callback = PredictExtendCallback(
        raw["predictor"],
        guards=raw["guards"],
        evaluate=lambda model: evaluate(model, "validation")["sampled"],
        **raw["schedule"],
    )
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))


def command(arguments: list[str], errors: Path) -> None:
    """``next-core ARGUMENTS`` by its entry point; what it says goes to a file."""
    from next_core.cli import main

    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["next-core", *arguments]
    main()

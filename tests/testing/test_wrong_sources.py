"""Each check of sources is failed by what is wrong in just this."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource
from next_core.mathematics.low_rank import LowRank, dense
from next_core.settings import Settings
from next_core.sources.memory import MemorySource
from next_core.testing import ContractError, SyntheticRun, check_source, checks_of, lora_run, write_lora_run
from next_core.types import LoraFactors, Parameter
from tests.testing.wrong_predictors import Drifting, Hidden, Lenient, Thawed


class Right(SyntheticRun):
    """Of the synthetic run; a subclass lies about it."""

    name = "right"

    def __init__(self) -> None:
        run = lora_run((5, 10, 15))
        super().__init__(run.weights, None, {step: run.metrics(step) for step in run.steps})
        self.config = self.config_class()


class TwoWords(Right):
    name = "two words"


class DriftingSettings(Right):
    config_class = Drifting


class ThawedSettings(Right):
    config_class = Thawed


class LenientSettings(Right):
    config_class = Lenient


class HiddenSettings(Right):
    config_class = Hidden


class Backwards(Right):
    @property
    def steps(self) -> tuple[int, ...]:
        return super().steps[::-1]


class Twice(Right):
    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (*super().parameters, super().parameters[0])


class Unlike(Right):
    """A dense delta, at one step, of what is LoRA."""

    def delta(self, name: str, step: int, since: int | None = None) -> LowRank | Tensor:
        found = super().delta(name, step, since)
        return dense(found) if (step, since) == (10, None) else found


class SkippedSilently(Right):
    @property
    def skipped(self) -> Mapping[str, str]:
        return {"norm.weight": ""}


class OneNote(Right):
    @property
    def notes(self) -> Sequence[str]:
        return "a note"


class NotFinite(Right):
    def delta(self, name: str, step: int, since: int | None = None) -> LowRank | Tensor:
        found = super().delta(name, step, since)
        return LowRank(found.left * torch.nan, found.right) if isinstance(found, LowRank) else found


class SinceNothing(Right):
    """Takes every delta since RL began."""

    def delta(self, name: str, step: int, since: int | None = None) -> LowRank | Tensor:
        return super().delta(name, step)


class AtRest(Right):
    def __init__(self) -> None:
        run = lora_run((5, 10, 15), moves=False)
        SyntheticRun.__init__(self, run.weights)


class RowsFromTheTop(Right):
    def delta_rows(self, name: str, rows: slice, step: int, since: int | None = None) -> Tensor:
        return dense(self.delta(name, step, since))[: len(range(*rows.indices(self._height(name))))]

    def _height(self, name: str) -> int:
        return next(parameter.shape[0] for parameter in self.parameters if parameter.name == name)


class Unscaled(Right):
    def factors(self, name: str, step: int) -> LoraFactors | None:
        found = super().factors(name, step)
        return found if found is None else dataclasses.replace(found, scaling=1.0)

    def delta(self, name: str, step: int, since: int | None = None) -> LowRank | Tensor:
        return lora_run((5, 10, 15)).delta(name, step, since)


class Standing(Right):
    def position(self, name: str, step: int) -> LowRank | Tensor:
        return super().position(name, self.steps[-1])


class Guessing(Right):
    """Answers for the newest step where it is asked for one that is not there."""

    def delta(self, name: str, step: int, since: int | None = None) -> LowRank | Tensor:
        return super().delta(name, min(step, self.steps[-1]), since)


class Whole(Right):
    def precision(self, name: str) -> torch.dtype:
        return torch.int64


class AllMetrics(Right):
    def metrics(self, step: int, since: int | None = None) -> Mapping[str, float]:
        return super().metrics(step)


class Wearing(Right):
    """Each read is a little longer than the one before."""

    reads = 0

    def delta(self, name: str, step: int, since: int | None = None) -> LowRank | Tensor:
        self.reads += 1
        found = super().delta(name, step, since)
        assert isinstance(found, LowRank)
        return found.scale(1 + 1e-9 * self.reads)


class Unpicklable(Right):
    def __init__(self) -> None:
        super().__init__()
        self.handle = lambda: None


class FolderConfig(Settings):
    path: Path


class OnDisk(CheckpointSource):
    """The B factors of a run's adapters as dense matrices; reads folders ``checkpoint-N`` plainly, and well enough."""

    name = "on-disk"
    config_class = FolderConfig

    def __init__(self, config: FolderConfig) -> None:
        super().__init__(config)
        found = sorted((int(folder.name.split("-")[1]), folder) for folder in config.path.glob("checkpoint-*"))
        self.folders = dict(found)
        self.inner = MemorySource(
            {step: self.read(folder) for step, folder in found}, backbone={"w": torch.zeros(6, 3)}
        )

    def read(self, folder: Path) -> dict[str, Tensor]:
        try:
            stored = load_file(folder / "adapter_model.safetensors")
            value = stored[_KEY]
        except Exception as error:
            raise CheckpointError(f"{folder} cannot be read: {error}") from None
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{folder} has values that are not finite")
        return {"w": value}

    @classmethod
    def detect(cls, path: Path) -> bool:
        return any(path.glob("checkpoint-*/adapter_model.safetensors"))

    @property
    def steps(self) -> tuple[int, ...]:
        return self.inner.steps

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.inner.parameters

    def fingerprint(self, step: int | None) -> str | None:
        return "start" if step is None else re.sub(r"\W", "", str(self.inner.delta("w", step).tolist()))

    def delta(self, name: str, step: int, since: int | None = None) -> Tensor:
        found = self.inner.delta(name, step, since)
        assert isinstance(found, Tensor)
        return found


class ClaimsAll(OnDisk):
    @classmethod
    def detect(cls, path: Path) -> bool:
        return True


class Placed(OnDisk):
    """What it reads depends on where it lies."""

    def delta(self, name: str, step: int, since: int | None = None) -> Tensor:
        return super().delta(name, step, since) * (1 + len(str(self.config.path)) / 1e9)


class Raw(OnDisk):
    """Lets the errors of a library through."""

    def read(self, folder: Path) -> dict[str, Tensor]:
        return {"w": load_file(folder / "adapter_model.safetensors")[_KEY]}


class Forgiving(OnDisk):
    def read(self, folder: Path) -> dict[str, Tensor]:
        return (
            {"w": load_file(folder / "adapter_model.safetensors")[_KEY]} if _readable(folder) else super().read(folder)
        )


class LeavesOut(OnDisk):
    """What is gone was never there."""

    def read(self, folder: Path) -> dict[str, Tensor]:
        if not (folder / "adapter_model.safetensors").exists():
            return {"w": torch.zeros(6, 3)}
        return super().read(folder)


class OnePrint(OnDisk):
    def fingerprint(self, step: int | None) -> str | None:
        return "always the same"


class PrintsOfNames(OnDisk):
    """Knows which step it is, and not what is in it."""

    def fingerprint(self, step: int | None) -> str | None:
        return f"step {step}"


_KEY = "base_model.model.model.layers.0.q_proj.lora_B.weight"


def _readable(folder: Path) -> bool:
    try:
        return _KEY in load_file(folder / "adapter_model.safetensors")
    except Exception:
        return False


DAMAGE = {"names_what_is_cut_short", "names_what_is_missing", "names_what_is_no_checkpoint"}
WRONG: dict[str, tuple[type[CheckpointSource], set[str]]] = {
    "has_a_name": (TwoWords, set()),
    "settings_survive_a_round_trip": (DriftingSettings, set()),
    "settings_are_frozen": (ThawedSettings, set()),
    "settings_refuse_what_they_do_not_know": (LenientSettings, set()),
    "settings_have_a_json_schema": (HiddenSettings, set()),
    "steps_ascend": (Backwards, {"metrics_are_numbers_within_their_span"}),
    "parameters_are_matrices_of_the_run": (Twice, set()),
    "parameters_are_the_same_in_every_checkpoint": (Unlike, set()),
    "skipped_parameters_have_reasons": (SkippedSilently, set()),
    "says_how_folders_are_named_and_what_to_know": (OneNote, set()),
    "deltas_are_finite": (
        NotFinite,
        {"deltas_add_up", "rows_agree_with_the_whole", "factors_give_the_delta"}
        | {"position_moves_as_the_deltas_do", "reads_the_same_again", "pickles"},
    ),
    "deltas_add_up": (SinceNothing, {"factors_give_the_delta", "position_moves_as_the_deltas_do"}),
    "some_matrix_moves": (AtRest, set()),
    "rows_agree_with_the_whole": (RowsFromTheTop, set()),
    "factors_give_the_delta": (Unscaled, set()),
    "position_moves_as_the_deltas_do": (Standing, set()),
    "what_is_not_there_is_refused_by_name": (Guessing, set()),
    "precision_is_a_floating_point_type": (Whole, set()),
    "metrics_are_numbers_within_their_span": (AllMetrics, set()),
    "reads_the_same_again": (Wearing, {"pickles"}),
    "pickles": (Unpicklable, set()),
    "detects_its_own_layout_only": (ClaimsAll, set()),
    "opens_a_copy_to_the_same": (Placed, DAMAGE | {"fingerprints_change_with_the_weights"}),
    "names_what_is_cut_short": (Raw, DAMAGE | {"refuses_values_that_are_not_finite"}),
    "names_what_is_missing": (LeavesOut, set()),
    "names_what_is_no_checkpoint": (Raw, DAMAGE | {"refuses_values_that_are_not_finite"}),
    "refuses_values_that_are_not_finite": (Forgiving, set()),
    "fingerprints_tell_states_apart": (OnePrint, {"fingerprints_change_with_the_weights"}),
    "fingerprints_change_with_the_weights": (PrintsOfNames, set()),
}


def made(cls: Any, folder: Path) -> CheckpointSource:
    if not issubclass(cls, OnDisk):
        source: CheckpointSource = cls()
        return source
    write_lora_run(folder / "checkpoints", lora_run((5, 10, 15), start=False))
    return cls(FolderConfig(path=folder / "checkpoints"))


@pytest.mark.parametrize("cls", [Right, OnDisk])
def test_what_is_right_passes(cls: type[CheckpointSource], tmp_path: Path) -> None:
    check_source(made(cls, tmp_path))


@pytest.mark.parametrize("name", checks_of("source"))
def test_what_is_wrong_in_one_thing_fails_its_check_and_no_other(name: str, tmp_path: Path) -> None:
    cls, besides = WRONG[name]
    with pytest.raises(ContractError) as caught:
        check_source(made(cls, tmp_path))
    assert name in caught.value.failed
    assert set(caught.value.failed) - {name} <= besides


def test_a_folder_is_opened_in_the_layout_that_is_detected(tmp_path: Path) -> None:
    write_lora_run(tmp_path / "checkpoints", lora_run((5, 10)))
    check_source(tmp_path / "checkpoints")
    with pytest.raises(AssertionError, match="at least two checkpoints"):
        check_source(lora_run((5,)))

"""Whether a check fails on a plug-in that breaks it, and a full-parameter run on disk."""

import unittest
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from next_core.testing import SyntheticRun, checks_of, dense_run
from next_core.testing.check_runner import CheckedKind

COMMON = "has_a_name_and_strict_settings"  # The check of every kind of plug-in, which ``test_kit`` breaks


def fails(check: str, kind: CheckedKind, subject: Any) -> bool:
    """Run one check on a plug-in or case that breaks it."""
    try:
        checks_of(kind)[check](subject)
    except unittest.SkipTest:
        return False
    except Exception:
        return True
    return False


def write_model_run(folder: Path) -> SyntheticRun:
    """Write full models, one ``checkpoint-N`` per step, and the base model to ``folder.parent / "base"``."""
    run = dense_run()
    models: Mapping[Path, Any] = {folder / f"checkpoint-{step}": weights for step, weights in run.weights.items()}
    for target, weights in {**models, folder.parent / "base": run._backbone}.items():
        target.mkdir(parents=True)
        (target / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return run

"""The message about a checkpoint that does not fit says what happened."""

from __future__ import annotations

from next_core.sources.folder_source import mismatch

OURS = {"layers.0.q": (2, 2), "layers.0.up": (4, 2), "norm": (2,)}


def test_equal_names_and_shapes_are_no_mismatch() -> None:
    assert mismatch(OURS, dict(OURS), "step 10") is None


def test_a_renamed_parameter_is_named_with_the_likeliest_new_name_of_its_shape() -> None:
    theirs = {"norm": (2,), "layers.0.qq": (3, 3), "zzz": (2, 2), "model.layers.0.q": (2, 2), "model.up": (4, 2)}
    message = mismatch(OURS, theirs, "step 10")
    assert message is not None
    assert "'layers.0.q' of step 10 is missing and 'model.layers.0.q' is new (of 2 missing, 4 new)" in message

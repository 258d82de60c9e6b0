"""The words for a checkpoint that does not fit say what happened."""

from __future__ import annotations

from next_core.sources.mismatch import mismatch

OURS = {"layers.0.q": (2, 2), "layers.0.up": (4, 2), "norm": (2,)}


def test_what_fits_needs_no_words() -> None:
    assert mismatch(OURS, dict(OURS), "step 10") is None


def test_a_renamed_parameter_is_named_with_the_likeliest_new_name() -> None:
    theirs = {"norm": (2,), "zzz": (2, 2), "model.layers.0.q": (2, 2), "model.layers.0.up": (4, 2)}
    words = mismatch(OURS, theirs, "step 10")
    assert words is not None
    assert "'layers.0.q' of step 10 is missing and 'model.layers.0.q' is new (of 2 missing, 3 new)" in words
    assert "did training rename its parameters?" in words


def test_a_new_parameter_of_another_shape_is_no_renamed_one_while_another_fits() -> None:
    words = mismatch({"a.q": (2, 2)}, {"a.qq": (3, 3), "other": (2, 2)}, "step 10")
    assert words is not None
    assert "'a.q' of step 10 is missing and 'other' is new" in words

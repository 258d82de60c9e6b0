"""The page of a comparison: what it says, and what it does with gaps, names and damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from next_core.errors import CheckpointError
from next_core.report.compare_summary import paired
from next_core.report.inputs import Interval
from next_core.report.write import write_report
from tests.report.conftest import Seen, read_page
from tests.report.made import Object, comparison, write_comparison

NASTY = '_$\\bad{$\x07\ud800 <script>alert(1)</script> & "'


def page(folder: Path, found: Object) -> Seen:
    return read_page(write_report(write_comparison(folder, found)).out)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return page(tmp_path_factory.mktemp("usual") / "race", comparison())


def test_the_summary_names_who_beats_plain_and_compares_the_best_with_what_costs_more(usual: Seen) -> None:
    assert "2 of 3 arms beat plain RL after 250 steps" in usual.words
    assert "interval of the paired difference: auto and secant." in usual.words
    assert "The best, auto, reaches 0.748: +0.248 (95% +0.203 to +0.294) against plain RL" in usual.words
    assert "+0.148 (95% +0.103 to +0.194) against plain RL of 400 steps" in usual.words
    assert "against plain RL tuned on the validation prompts (training.learning_rate = 0.001)" in usual.words


def test_every_arm_has_its_row_with_intervals_bounds_and_choices(usual: Seen) -> None:
    for name in comparison()["arms"]:
        assert usual.words.count(name) >= 3
    assert "≥ 363" in usual.words
    assert "training.learning_rate = 0.001" in usual.words
    assert "training.learning_rate = 0.0005" in usual.words
    assert "tuned learning rate: 3, auto: 1" in usual.words
    assert "0.726 to 0.770" in usual.words
    assert "8.1 or more" in usual.words


def test_the_pictures_are_there_with_words_for_who_cannot_see_them(usual: Seen) -> None:
    starts = (
        "Forest plot",
        "Curves of test accuracy over RL steps",
        "Curves of test accuracy over seconds",
        "Multiples",
    )
    assert len(usual.pictures) == len(starts)
    for start in starts:
        assert any(label.startswith(start) for label in usual.pictures), start


def test_refusals_are_grouped_and_counted(usual: Seen) -> None:
    assert "such as: the jump is 28.5 times the motion" in usual.words
    assert "auto 333 324 9 20 to 240" in usual.words


def test_config_versions_hardware_and_seeds_are_shown(usual: Seen) -> None:
    for words in ("2 CPU cores (x86_64)", "seeds 0, 1, 2", "all seeds 9,000", "torch 2.13.0", "predictor: name: stay"):
        assert words in usual.words


def test_one_seed_has_no_intervals_and_says_so(tmp_path: Path) -> None:
    seen = page(tmp_path / "one", comparison(seeds=1))
    assert "One seed gives no intervals" in seen.words
    assert "95%" not in seen.words.replace("95% intervals", "")


def test_many_arms_fit(tmp_path: Path) -> None:
    seen = page(tmp_path / "many", comparison(extra=9))
    assert "secant, window 90" in seen.words


def test_gaps_are_dashes_and_reasons_and_not_errors(tmp_path: Path) -> None:
    found = comparison(seeds=2)
    for arm in found["arms"].values():
        gone = ("difference", "difference_longer", "equals_step", "steps_saved", "icer", "seconds_saved", "curve")
        arm |= dict.fromkeys(gone) | {"jumps": {}, "variants": arm["variants"][:1]}
    found |= {"longer": None, "rollouts_per_step": None, "config": {}, "versions": {}, "base": {}}
    written = write_report(write_comparison(tmp_path / "gaps", found))
    seen = read_page(written.out)
    assert seen.pictures == []
    assert written.missing["Jumps"] == "no arm tried one"
    assert written.missing["Choices"] == "every arm ran with one setting, so that nothing was chosen"
    assert "no arm has accuracies along its way" in seen.words


def test_a_control_that_beats_plain_is_a_warning(tmp_path: Path) -> None:
    found = comparison()
    found["arms"]["random direction"] = found["arms"]["auto"] | {"role": "control"}
    assert "Beware: random direction, meant as a control, beats plain RL" in page(tmp_path / "odd", found).words


def test_names_and_reasons_of_anybody_are_shown_and_not_run(tmp_path: Path) -> None:
    found = comparison(seeds=2)
    found["arms"][NASTY] = found["arms"].pop("auto")
    for jumps in found["arms"][NASTY]["jumps"].values():
        for jump in jumps:
            jump |= {"accepted": False, "reason": NASTY, "predictor": NASTY}
    found["config"] = {"key": "</pre><script>"}
    seen = page(tmp_path / "nasty", found)  # read_page finds no script
    assert '_$\\bad{$\ufffd\ufffd <script>alert(1)</script> & "' in seen.words
    assert "\x07" not in seen.page
    assert "</pre><script>" in seen.words


def test_the_same_comparison_makes_the_same_page(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "race", comparison(seeds=2))
    first = write_report(folder).out.read_bytes()
    assert write_report(folder).out.read_bytes() == first


def damaged(change: Any) -> str:
    found = comparison(seeds=2)
    change(found)
    return json.dumps(found)


DAMAGE = {
    "truncated": (json.dumps(comparison())[:5000], "cannot be read"),
    "a list": ("[]", "compare.json"),
    "text for a number": (damaged(lambda f: f["arms"]["plain"]["test"]["sampled"].update(mean="0.5")), "sampled.mean"),
    "NaN": (damaged(lambda f: f["arms"]["plain"]["test"]["sampled"].update(mean=float("nan"))), "sampled.mean"),
    "a short column": (damaged(lambda f: f["arms"]["auto"]["curve"]["seconds"].pop()), "arms.auto.curve"),
    "no arms": (damaged(lambda f: f.update(arms={})), "compare.json.arms"),
    "an unknown role": (damaged(lambda f: f["arms"]["auto"].update(role="hero")), "arms.auto.role"),
    "deep": ("[" * 100_000, "cannot be read"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_an_error_that_names_the_file_and_the_remedy(what: str, tmp_path: Path) -> None:
    text, told = DAMAGE[what]
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(CheckpointError, match="compare again") as error:
        write_report(tmp_path)
    assert told in str(error.value)
    assert str(tmp_path / "compare.json") in str(error.value)
    assert not (tmp_path / "report").exists()


def test_paired_differences_agree_with_scipys_test() -> None:
    from scipy.stats import ttest_rel

    mine, other = {"0": 0.5, "1": 0.62, "2": 0.58}, {"0": 0.4, "1": 0.43, "2": 0.5, "3": 0.9}
    found = paired(Interval(mean=0.0, values=dict(mine)), Interval(mean=0.0, values=dict(other)))
    expected = ttest_rel(list(mine.values()), list(other.values())[:3]).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert paired(Interval(mean=0.0), Interval(mean=0.0)) is None

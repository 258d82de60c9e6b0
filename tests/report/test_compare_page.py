"""The page of a comparison: its figures, and what it makes of gaps, hostile names and damage."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from next_core.comparison.comparison_results import Interval
from next_core.report.compare_page import paired
from next_core.report.write import WrittenReport, write_report
from tests.errors import raises_kind
from tests.report.conftest import Seen, read_page
from tests.report.made import Object, comparison, write_comparison

HOSTILE = '_$\\bad{$\x07\ud800 <script>alert(1)</script> & "'


def write(folder: Path, found: Object) -> tuple[WrittenReport, Seen]:
    written = write_report(write_comparison(folder, found))
    return written, read_page(written.out)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[WrittenReport, Seen]:
    return write(tmp_path_factory.mktemp("usual") / "race", comparison())


def test_the_summary_names_the_arms_that_beat_plain_and_compares_the_best(usual: tuple[WrittenReport, Seen]) -> None:
    ahead, plain, best = usual[0].summary
    for words in ("2 of 3 arms beat plain RL (auto and secant)", "none beats tuned learning rate", "beat no jump"):
        assert words in ahead
    assert "250 steps plain RL reaches 0.499" in plain
    for words in ("auto", "0.748", "+0.248 (95% +0.203 to +0.294)", "+0.148 (95% +0.103 to +0.194)", "400 steps"):
        assert words in best
    for words in ("−0.027 (95% −0.051 to −0.003)", "training.learning_rate = 0.001"):
        assert words in best
    assert all(sentence in usual[1].words for sentence in usual[0].summary)


def test_every_arm_has_its_figures_intervals_bounds_choices_and_refusals(usual: tuple[WrittenReport, Seen]) -> None:
    words = usual[1].words
    for name in comparison()["arms"]:
        assert words.count(name) >= 3
    for figures in (
        "auto 250 0.748 0.726 to 0.770",
        "≥ 363",
        "8.1 or more",
        "≥ 13.0 s less",
        "tuned learning rate: 3, auto: 1",
    ):
        assert figures in words
    for setting in ("training.learning_rate = 0.001 0.775", "training.learning_rate = 0.0005 0.725"):
        assert setting in words
    assert "the jump is 28.5 times" in words
    assert "auto 333 324 9 20 to 240" in words
    for setup in ("2 CPU cores (x86_64)", "seeds 0, 1, 2", "9,000", "torch 2.13.0", "predictor: name: stay"):
        assert setup in words


def test_every_plot_has_a_description(usual: tuple[WrittenReport, Seen]) -> None:
    starts = ("Curves of test accuracy over RL", "Forest plot", "Accuracy over seconds", "Multiple")
    assert [label.startswith(start) for label, start in zip(usual[1].pictures, starts, strict=True)] == [True] * 4


def test_many_arms_with_one_seed_have_no_intervals_and_give_the_same_page_again(tmp_path: Path) -> None:
    written, seen = write(tmp_path / "one", comparison(seeds=1, extra=3))
    assert "no intervals" in seen.words
    assert "95%" not in seen.words
    assert "secant, window 30" in seen.words
    first = written.out.read_bytes()
    assert write_report(tmp_path / "one").out.read_bytes() == first


def test_gaps_are_dashes_and_reasons_and_not_errors(tmp_path: Path) -> None:
    found = comparison(seeds=2)
    for arm in found["arms"].values():
        gone = ("difference", "difference_longer", "equals_step", "steps_saved", "icer", "seconds_saved", "curve")
        arm |= dict.fromkeys(gone) | {"jumps": {}, "variants": arm["variants"][:1]}
    found |= {"longer": None, "rollouts_per_step": None, "config": {}, "versions": {}, "base": {}}
    written, seen = write(tmp_path / "gaps", found)
    assert seen.pictures == []
    curves = {"Differences to plain RL", "Accuracy over RL steps", "Accuracy over seconds of training"}
    assert written.missing.keys() == {"Jumps", "Config", *curves}
    assert all(f"{what}: {reason}" in seen.words for what, reason in written.missing.items())


def test_a_control_that_beats_plain_is_a_warning_and_hostile_names_are_shown_as_text(tmp_path: Path) -> None:
    found = comparison(seeds=2)
    found["arms"]["random direction"] = found["arms"]["auto"] | {"role": "control"}
    found["arms"][HOSTILE] = arm = found["arms"].pop("auto")
    arm["jumps"] = {"0": [{"step": 5, "accepted": False, "reason": HOSTILE, "predictor": HOSTILE}]}
    found["config"] = {"key": "</pre><script>"}
    written, seen = write(tmp_path / "hostile", found)  # read_page finds no script
    assert "random direction" in written.summary[-1]
    assert '_$\\bad{$\ufffd\ufffd <script>alert(1)</script> & "' in seen.words
    assert "\x07" not in seen.page
    assert "</pre><script>" in seen.words


def damaged(change: Callable[[Object], object]) -> str:
    found = comparison(seeds=2)
    change(found)
    return json.dumps(found)


DAMAGE = {
    "truncated": (json.dumps(comparison())[:5000], ""),
    "a list": ("[]", ""),
    "text for a number": (damaged(lambda f: f["arms"]["plain"]["test"]["sampled"].update(mean="0.5")), "sampled.mean"),
    "NaN": (damaged(lambda f: f["arms"]["plain"]["test"]["sampled"].update(mean=float("nan"))), "sampled.mean"),
    "a short column": (damaged(lambda f: f["arms"]["auto"]["curve"]["seconds"].pop()), "arms.auto.curve"),
    "no arms": (damaged(lambda f: f.update(arms={})), "compare.json.arms"),
    "an unknown role": (damaged(lambda f: f["arms"]["auto"].update(role="hero")), "arms.auto.role"),
    "deep": ("[" * 100_000, ""),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_an_error_that_names_the_file_and_the_place(what: str, tmp_path: Path) -> None:
    text, place = DAMAGE[what]
    (tmp_path / "compare.json").write_text(text)
    with raises_kind("report-damaged-file", tmp_path / "compare.json", place):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_paired_differences_agree_with_scipys_test() -> None:
    mine, other = {"0": 0.5, "1": 0.62, "2": 0.58}, {"0": 0.4, "1": 0.43, "2": 0.5, "3": 0.9}
    found = paired(Interval(mean=0.0, values=dict(mine)), Interval(mean=0.0, values=dict(other)))
    expected = ttest_rel(list(mine.values()), list(other.values())[:3]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert paired(Interval(mean=0.0), Interval(mean=0.0)) is None


def test_two_seeds_are_two_lines_and_three_a_band(tmp_path: Path) -> None:
    for seeds, lines in ((2, 2), (3, 1)):
        found = comparison(seeds=seeds)
        plain = found["arms"]["plain"]["curve"]["test"]["sampled"]
        plain["values"] = {str(seed): plain["mean"] for seed in range(seeds)}
        _, seen = write(tmp_path / str(seeds), found)
        assert seen.page.count('data-name="plain"') == lines * 4  # two charts, each in two widths

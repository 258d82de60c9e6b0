"""The rows and tables of `auto` next to plain RL, from records and rows whose figures can be worked out by hand."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("rates")


@pytest.fixture
def tables(rates: Any) -> Any:
    return importlib.import_module("rate_tables")


def row(rate: float, arm: str, bare: float | None, final: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    facts = {"task": "arithmetic", "learning_rate": rate, "seed": seed, "arm": arm, "setting": ""}
    return facts | {"before_average": bare, "final": final, "factor": None} | more


def auto(rate: float, final: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A run of step scaling that climbs to .5 by step 50 and to ``final`` by step 250, and restarted once."""
    curve = [(0, 0.2, 0.6), (50, 0.5, 0.7), (250, final, 0.9)]
    found = {"step": 40 + seed, "rate": 2e-3, "last": 1e-3}
    facts = {"curve": [{"step": s, "sampled": a, "greedy": g} for s, a, g in curve], "found": found}
    return row(rate, "auto", final - 0.02, final, seed, restarts=1, collapses=0) | facts | more


def rows() -> list[dict[str, Any]]:
    return [
        *(row(1e-4, "plain", 0.5, 0.51, seed, factor=12.8 + seed) for seed in (0, 1)),
        row(1e-4, "adaptive-secant", 0.69, 0.7),
        *(auto(1e-4, 0.75 + 0.02 * seed, seed) for seed in (0, 1)),
        *(row(1e-3, "plain", 0.8, 0.82, seed) for seed in (0, 1, 2)),
        auto(1e-3, 0.83),
        *(row(2e-3, "plain", 0.79, 0.84 if seed else 0.9, seed) for seed in (0, 1, 2)),
        *(row(1e-3, "linear", None, 0.81, seed) for seed in (0, 1, 2)),
        row(1e-2, "plain", 0.95, 0.95),
        auto(1e-2, 0.8, found=None),
    ]


def cells(line: str) -> list[str]:
    return line.strip("| ").split(" | ")


def test_each_starting_rate_stands_next_to_plain_rl_jumps_and_the_best_known_run(rates: Any, tables: Any) -> None:
    small, right, large = tables.every_rate(rates.by_arm(rows())).splitlines()[2:]
    assert cells(small)[:6] == ["arithmetic", "0.0001", "0.500, 0.510", "0.700", "0.740, 0.760", "0.900"]
    assert cells(small)[6] == "+0.250 ±0.127", "of seeds 0 and 1: .24 and .26, and t is 12.7"
    assert cells(small)[7].startswith("-0.110 ±"), "of seeds 0 and 1: .75 - .90 and .77 - .84"
    assert cells(small)[8] == "2, 1, 2"
    assert cells(right)[7] == "-0.070"
    assert cells(large)[6] == "-0.150"


def test_the_best_known_run_has_enough_seeds(rates: Any, tables: Any) -> None:
    found = rates.by_arm(rows())
    best = tables.best_known(found, "arithmetic")
    assert (best.name, best.rate) == ("with the mean at the end", 2e-3), "and not the lucky single run at 1e-2"
    assert cells(tables.tuned(found).splitlines()[2]) == [
        "arithmetic", "0.800 (0.001; 3)", "0.860 (0.002; 3)", "0.810 (0.001; 3)",
    ]  # fmt: skip


def test_a_step_that_reaches_an_accuracy_is_interpolated(tables: Any) -> None:
    curve = [(0, 0.2), (50, 0.4), (100, 0.3), (150, 0.6)]
    assert tables.reached(curve, 0.3) == pytest.approx(25)
    assert tables.reached(curve, 0.5) == pytest.approx(100 + 50 * 2 / 3)
    assert tables.reached(curve, 0.7) is None
    assert tables.at_step(curve, 125) == pytest.approx(0.45)


def test_longer_plain_runs_are_matched_by_seed(rates: Any, tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = {(1e-4, 0): [(0, 0.2), (400, 0.5)], (1e-4, 1): [(0, 0.2), (400, 0.6)], (1e-4, 2): [(400, 0.1)]}
    longer[1e-3, 0] = [(400, 0.85)]
    monkeypatch.setattr(tables, "plain_curves", lambda task: longer if task == "arithmetic" else {})
    small, right = tables.against_longer(rates.by_arm(rows())).splitlines()[2:]
    assert cells(small)[2:4] == ["0.400", "0.760"]
    assert cells(small)[4].startswith("+0.210 ±"), "of seeds 0 and 1"
    assert cells(small)[5:] == ["87 (50 to 124)", "3, 2"]
    assert cells(right)[5:] == ["never in 1 of 1", "1, 1"]


def test_a_sweep_of_as_many_rollouts_divides_its_steps(
    rates: Any, tables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = {(1e-3, 0): [(0, 0.2), (250, 0.7)], (2e-3, 0): [(0, 0.2), (250, 0.95)], (1e-3, 1): [(0, 0.9), (250, 0.9)]}
    monkeypatch.setattr(tables, "plain_curves", lambda task: curves)
    line = cells(tables.sweeps(rates.by_arm(rows())).splitlines()[2])
    assert line[1] == "0.793 (0.750 to 0.830)", "of seed 0, which every starting rate has"
    assert line[2:4] == ["0.325", "0.294"], "62.5 steps at 1e-3 without 2e-3, and 31.25 at 2e-3; of seed 0"
    assert line[4:] == ["0.950", "0.950", "1"]


def test_the_rates_found_are_those_of_all_starts(rates: Any, tables: Any) -> None:
    line = cells(tables.rates_found(rates.by_arm(rows())).splitlines()[2])
    assert line[1:4] == ["2.0e-03 (2.0e-03 to 2.0e-03)", "40 (40 to 41)", "1.0e-03 (1.0e-03 to 1.0e-03)"]
    assert line[4:] == ["0.001, 0.002", "4, 0", "3 of 4"]


def test_a_row_has_the_rates_after_the_last_return_to_the_start(rates: Any) -> None:
    def scale(step: int, rate: float, phase: int, **more: Any) -> dict[str, Any]:
        return {"event": "scale", "step": step, "rate": rate, "diagnostics": {"phase": float(phase)}} | more

    records = [
        scale(5, 9e-2, 2),
        {"event": "collapse", "step": 6, "back_to": 0, "rate": 1e-2},
        scale(10, 3e-3, 0, back_to=0),
        scale(15, 4e-3, 1),
        {"event": "scale", "step": 17, "accepted": False, "multiple": 4.0},
        scale(20, 3e-3, 2),
        {"event": "collapse", "step": 30, "back_to": 20, "rate": 1e-3},
        scale(35, 2e-3, 2),
    ]
    assert rates.scaled(records) == {
        "found": {"step": 20, "rate": 3e-3, "last": 2e-3},
        "lowest": 1e-3,
        "highest": 3e-3,
        "restarts": 1,
        "collapses": 2,
    }
    assert rates.scaled(records[:4])["found"] is None


def test_what_is_missing_begins_with_the_first_seed_of_everything(rates: Any) -> None:
    wanted = rates.missing(rows(), seeds=2)
    tasks = [seed for _, _, seed, _, setting in wanted if not setting]
    assert tasks == sorted(tasks)
    assert ("arithmetic", 1e-4, 1, "auto", "") not in wanted
    assert ("sorting", 1e-4, 1, "auto", "") in wanted
    assert ("arithmetic", 1e-3, 1, "auto", "LoRA rank 2") in wanted


def test_the_page_has_the_tables_of_the_committed_results(rates: Any, tables: Any) -> None:
    text = tables.tables(json.loads(rates.FILE.read_text())["rows"])
    assert text in (Path(__file__).parents[2] / "docs" / "benchmarks" / "auto.md").read_text(), "make tables"

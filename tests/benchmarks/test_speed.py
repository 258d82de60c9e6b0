"""The speed benchmarks run at toy size, their runs are always the same ones, and the page shows what was measured."""

import gc
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.speed import __main__ as command
from benchmarks.speed import clock, machine, reference, synthetic, table
from benchmarks.speed.stage import ORDER, STAGES
from benchmarks.speed.synthetic import LoraRun
from next_core import open_checkpoints

RUN = LoraRun(replace(synthetic.TOY, layers=3), rank=4, distinct=2)
RATES = machine.Rates({"fp64": 20.0, "fp32": 40.0, "bf16": 80.0}, 10.0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What ``all --toy`` leaves."""
    folder = tmp_path_factory.mktemp("results")
    gc.freeze()  # stages collect garbage before they measure: not that of all tests so far
    try:
        command.main(["all", "--toy", "--results", str(folder)])
        yield folder
    finally:
        gc.unfreeze()


def test_every_stage_runs_at_toy_size_and_leaves_its_own_file(results: Path) -> None:
    assert set(STAGES) == set(ORDER)
    assert {path.name for path in results.iterdir()} == {f"speed-{name}.json" for name in ORDER}
    for facts in table.load(results):
        assert facts["rows"] or facts["series"]
        assert facts["hardware"]["cpu"]
        for row in facts["rows"]:
            assert "skipped" in row or (row["cpu_s"] > 0 and row["wall_s"] > 0)
            assert "skipped" in row or "target_cpu_s" in row or "inner products" in row["what"]


def test_ours_agrees_with_an_exact_decomposition_at_toy_size(results: Path) -> None:
    for name in ("compress-0.5B", "compress-1.5B", "compress-7B"):
        row = json.loads((results / f"speed-{name}.json").read_text())["rows"][0]
        assert row["errors"]["sigma"] < 1e-6
        assert row["errors"]["u"] < 1e-5


def test_a_linear_jump_is_what_the_line_says(results: Path) -> None:
    rows = json.loads((results / "speed-jump-1.5B.json").read_text())["rows"]
    assert len(rows) == 2
    for row in rows:
        assert row["errors"]["elements_unlike"] < 0.01  # fp32 and fp64 round some elements to another bf16


def test_the_page_shows_the_committed_results() -> None:
    assert table.shown() == table.render(table.load(table.RESULTS))


def test_committed_results_are_whole_and_not_of_toys() -> None:
    committed = table.load(table.RESULTS)
    assert [facts["stage"] for facts in committed] == list(ORDER)
    assert not any(facts["toy"] for facts in committed)


def test_a_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    assert RATES.floor(2.0, "fp64", flops=20e9, moved=5e9)["seconds"] == 1.0
    assert RATES.floor(2.0, "fp64", flops=20e9, moved=5e10)["seconds"] == 5.0
    measured = machine.measure_rates(size=64, megabytes=1)
    assert measured.copy > 0
    assert all(rate > 0 for rate in measured.gemm.values())


def test_every_floor_is_positive_and_below_what_was_measured(results: Path) -> None:
    floors = [row["floor"] for facts in table.load(results) for row in facts["rows"] if "floor" in row]
    assert len(floors) >= 8
    assert all(floor["seconds"] > 0 and floor["ratio"] > 1 for floor in floors)


def test_a_run_is_the_same_each_time_it_is_made() -> None:
    first, second = (
        [{k: (A.clone(), B.clone()) for k, (A, B) in f.items()} for _, f in RUN.checkpoints()] for _ in "ab"
    )
    for one, other in zip(first, second, strict=True):
        for name in one:
            assert all(torch.equal(x, y) for x, y in zip(one[name], other[name], strict=True))


def test_a_written_run_opens_with_the_public_reader(tmp_path: Path) -> None:
    source = open_checkpoints(RUN.write(tmp_path / "checkpoints"))
    assert source.steps == RUN.steps
    assert {p.name: p.shape for p in source.parameters} == RUN.shapes.matrices()
    for step, factors in RUN.checkpoints():
        stored = source.factors("model.layers.2.mlp.down_proj.weight", step)
        assert stored.scaling == RUN.scaling
        assert torch.equal(stored.B, factors["model.layers.2.mlp.down_proj.weight"][1])


def test_the_error_of_a_direction_ignores_its_sign_and_is_exact_for_small_angles() -> None:
    u = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert reference.sine(-u, u) == 0.0
    assert reference.sine(torch.tensor([1.0, 1e-9], dtype=torch.float64), u) == pytest.approx(1e-9)


def test_memory_is_that_of_a_process_of_its_own() -> None:
    held, memory = clock.apart(hold, 200)
    assert held == 200
    assert 0.19 < memory["own_gib"] - memory["imports_gib"] < 0.4


def hold(megabytes: int) -> int:
    """Take memory long enough to be seen."""
    block = torch.ones(megabytes * 2**18)
    time.sleep(0.5)
    return block.numel() // 2**18

"""The analysis as a whole: what it says of known runs, what it leaves out and why, and the object it answers."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from next_core.checkpoints import open_checkpoints
from next_core.compressors.exact import ExactCompressor
from next_core.diagnostics import FIGURES, Analysis, FromFirstCheckpoint, Group, analyze, with_origin
from next_core.diagnostics.analysis import kind_of, layer_of
from next_core.diagnostics.analysis_results import advice
from next_core.diagnostics.figures import Figure, Null
from next_core.history.history import History
from next_core.sources.memory import MemorySource
from next_core.storage.json_lines import json_text
from next_core.types import LoraFactors
from tests.diagnostics.runs import FIFTEEN, history, lora_walks, name, straight, walks
from tests.errors import raises_kind
from tests.predictors.trajectories import curved_lora_run, dense_run, drift, noise, still


def strict(analysis: Analysis) -> object:
    """Its JSON, which must not need NaN."""
    return json.loads(json.dumps(analysis.as_dict(), allow_nan=False))


def value(analysis: Analysis, figure: str) -> float:
    return analysis.overall.value(figure)


def test_a_straight_line_is_called_one() -> None:
    analysis = analyze(history(straight()))
    for figure in ("c1_r2", "line_r2", "line_skill", "pinned_skill", "line_r2_out", "cosine_local", "straightness"):
        assert value(analysis, figure) == pytest.approx(1), figure
    assert value(analysis, "msd_exponent") == pytest.approx(2)
    assert value(analysis, "speed_ratio") == pytest.approx(1)
    for figure in ("c1_r2", "pinned_skill", "cosine_local", "msd_exponent", "squared_energy_ratio_global"):
        assert analysis.overall.figures[figure].outside == "above", figure
    assert analysis.frozen == {name(1): "did not move since step 140"}
    assert "straight" in analysis.advice[0]
    assert any("nearly of rank 1" in sentence for sentence in analysis.advice)


@pytest.mark.parametrize("lora", [False, True], ids=["dense", "lora"])
def test_a_random_walk_lies_inside_its_null_19_times_of_20(lora: bool) -> None:
    """40 matrices are 40 walks, and each figure's interval should hold about 38 of them."""
    analysis = analyze(history(lora_walks(40) if lora else walks(40)), draws=60)
    assert analysis.missing.keys() <= {"cosine_u_global", "cosine_v_global"}
    for figure in FIGURES:
        each = [group.figures[figure] for group in analysis.matrices.values() if figure in group.figures]
        inside = [one.outside is None for one in each if one.null is not None]
        no_null = figure == "speed_ratio" or (not lora and figure in ("cosine_u_global", "cosine_v_global"))
        assert len(inside) == (0 if no_null else 40), figure
        assert no_null or sum(inside) / 40 >= 0.85, figure


def test_a_straight_lora_run_is_told_from_walks_of_factors() -> None:
    analysis = analyze(history(curved_lora_run(names=[name(0), name(1), name(1, "v_proj")])))
    assert value(analysis, "cosine_local") > 0.9
    assert analysis.overall.figures["cosine_local"].outside == "above"
    null = analysis.overall.figures["squared_energy_ratio_global"].null
    assert 0.5 < null.mean < 1.0  # a walk of rank-2 factors puts at least half of its energy in one direction


def test_matrices_are_summed_up_by_layer_and_by_kind() -> None:
    run = dense_run(
        {name(0): drift(0), name(0, "v_proj"): drift(2), name(3): drift(4), "lm_head.weight": drift(6)}, (10, 20, 30)
    )
    analysis = analyze(history(run), draws=20)
    assert {layer: len(group.members) for layer, group in analysis.layers.items()} == {0: 2, 3: 1}
    sizes = {kind: len(group.members) for kind, group in analysis.kinds.items()}
    assert sizes == {"lm_head": 1, "q_proj": 2, "v_proj": 1}
    assert (analysis.matrices[name(3)].layer, analysis.matrices["lm_head.weight"].layer) == (3, None)
    assert analysis.kinds["q_proj"].figures["speed_ratio"].matrices == 2
    assert layer_of("transformer.h.11.attn.c_attn.weight") == 11
    assert kind_of("model.layers.12.mlp.up_proj.weight") == "up_proj"
    assert kind_of("model.layers.0.mlp.experts.gate_up_proj[17]") == "gate_up_proj"


def test_a_group_shows_the_median_and_its_quartiles() -> None:
    analysis = analyze(history(walks(5)))
    each = sorted(group.value("straightness") or 0.0 for group in analysis.matrices.values())
    figure = analysis.overall.figures["straightness"]
    assert figure.value == pytest.approx(each[2])
    assert figure.quartiles == pytest.approx((each[1], each[3]))
    series = analysis.overall.series["cosine_local"]
    assert (series.over, series.x) == ("step", FIFTEEN[1:])
    assert series.null is not None
    assert len(series.null) == len(series.value) == 14


@pytest.mark.parametrize(
    ("steps", "there", "missing"),
    [
        ((10,), {"squared_energy_ratio_global"}, {"cosine_local", "c1_r2", "msd_exponent", "pinned_skill"}),
        ((10, 20), {"cosine_local", "top_1_share", "straightness"}, {"c1_r2", "line_r2", "msd_exponent", "line_skill"}),
        (
            (10, 20, 30),
            {"c1_r2", "line_r2", "line_skill", "speed_ratio"},
            {"msd_exponent", "line_r2_out", "top_5_share"},
        ),
        ((10, 20, 30, 40), {"msd_exponent", "line_r2_out", "pinned_skill"}, {"top_5_share", "top_1_of_top_5"}),
        ((5, 10, 20, 40, 45, 60), {"msd_exponent", "top_5_share", "pinned_skill"}, set()),
        ((0, 10, 20, 30, 40), {"msd_exponent", "line_r2_out"}, {"top_5_share"}),
    ],
)
def test_too_few_checkpoints_leave_out_figures(steps: Sequence[int], there: set[str], missing: set[str]) -> None:
    analysis = analyze(history(dense_run({name(0): drift(0), name(1): drift(2)}, steps)))
    assert analysis.steps == tuple(step for step in steps if step)
    assert analysis.missing.keys() >= missing
    assert not analysis.missing.keys() & there
    for figure in there:
        assert analysis.overall.value(figure) is not None
    for figure in missing:
        assert "needs" in analysis.missing[figure]
    strict(analysis)


def test_a_run_that_never_moved_says_so() -> None:
    analysis = analyze(history(dense_run({name(0): still(), name(1): still()}, (10, 20, 30))))
    assert set(analysis.missing) == set(FIGURES)
    assert len(analysis.frozen) == 2
    assert "No matrix moved" in analysis.advice[0]
    strict(analysis)


def test_an_adapter_whose_product_stays_zero_leaves_its_figures_undefined() -> None:
    checkpoints = {t: {name(0): LoraFactors(noise(t, 8, 2), torch.zeros(3, 8), 2.0)} for t in range(5)}
    analysis = analyze(history(MemorySource(checkpoints)), draws=20)
    assert analysis.missing["straightness"].startswith("not defined")
    strict(analysis)


def test_a_matrix_that_stood_still_for_a_while_has_what_can_be_defined() -> None:
    path = drift(0)
    analysis = analyze(history(dense_run({name(0): lambda t: path(0 if t < 40 else t)}, tuple(range(10, 90, 10)))))
    assert analysis.overall.value("speed_ratio") is None
    assert analysis.missing["speed_ratio"].startswith("not defined")
    assert value(analysis, "cosine_local") == pytest.approx(1)
    strict(analysis)


def test_any_horizon_of_a_long_run_can_be_asked_for_though_the_curve_has_a_choice_of_them() -> None:
    run = history(walks(1, range(1, 101)))
    every = analyze(run, draws=20)
    asked = next(h for h in range(1, 51) if h not in every.overall.series["line_skill"].x)
    found = analyze(run, horizon=asked, draws=20)
    assert value(found, "pinned_skill") < 0  # a line does not predict a random walk
    assert found.overall.series["line_skill"].x == tuple(sorted({asked, *every.overall.series["line_skill"].x}))
    assert found.overall.series["msd"] == every.overall.series["msd"]
    assert value(analyze(run, horizon=90, draws=20), "line_skill") < 0  # longer than half of the run


def test_the_horizon_chooses_the_out_of_sample_figures_and_one_that_is_not_there_is_explained() -> None:
    run = history(walks(2))
    first = analyze(run, draws=20)
    assert first.horizon == 50  # the longest up to a third of 150 steps
    series = first.overall.series["line_skill"]
    for horizon in (10, 60):
        chosen = analyze(run, horizon=horizon, draws=20)
        assert value(chosen, "line_skill") == series.value[series.x.index(horizon)]
    assert "10, 20, 30" in analyze(run, horizon=25, draws=20).missing["pinned_skill"]
    with raises_kind("config-invalid-value", "horizon"):
        analyze(run, horizon=0)
    with raises_kind("config-invalid-value", "draws"):
        analyze(run, draws=3)


def test_a_full_run_without_its_backbone_counts_from_the_first_checkpoint() -> None:
    whole = straight()
    lost = MemorySource({t: {name(0): whole._value(name(0), t)} for t in FIFTEEN})
    source = with_origin(lost)
    assert isinstance(source, FromFirstCheckpoint)
    analysis = analyze(history(source))
    assert (analysis.origin, analysis.steps) == (10, FIFTEEN[1:])
    assert value(analysis, "msd_exponent") == pytest.approx(2)
    assert "no backbone" in analysis.notes[-1]
    assert with_origin(whole) is whole
    with raises_kind("checkpoint-too-few", "--backbone"):
        with_origin(MemorySource({10: {name(0): torch.ones(3, 2)}}))


def test_a_lora_run_whose_step_0_was_not_kept_still_has_its_null() -> None:
    kept = lora_walks(2)
    later = MemorySource({t: {n: kept._value(n, t) for n in (name(0), name(1))} for t in FIFTEEN})
    assert isinstance(kept._value(name(0), 0), LoraFactors)
    for source in (kept, later):
        null = analyze(history(source)).overall.figures["squared_energy_ratio_global"].null
        assert 0.3 < null.mean < 0.7


def test_half_precision_checkpoints_that_drown_the_signal_are_warned_of(tmp_path: Path) -> None:
    weight, step_of = noise(0, 40, 30), torch.outer(noise(1, 40), noise(2, 30))
    for dtype, folder in ((torch.bfloat16, tmp_path / "half"), (torch.float32, tmp_path / "full")):
        for step in (0, 10, 20, 30):
            place = folder / f"checkpoint-{step}"
            place.mkdir(parents=True)
            save_file({name(0): (weight + 1e-6 * step * step_of).to(dtype)}, place / "model.safetensors")
    half, full = (
        analyze(History(with_origin(open_checkpoints(tmp_path / kind)), 1, ExactCompressor()))
        for kind in ("half", "full")
    )
    assert full.precision is None
    assert half.precision.drowned == (name(0),)
    assert 0 < half.precision.delta_to_ulp[name(0)] < 1
    assert any("rounding" in sentence for sentence in half.advice)
    strict(half)


def test_the_documentation_names_every_figure_and_the_json_has_no_nan() -> None:
    found = analyze(history(lora_walks(2))).as_dict()
    page = (Path(__file__).parents[2] / "docs" / "analyze.md").read_text()
    assert not [figure for figure in FIGURES if f"`{figure}`" not in page]
    assert json.loads(json_text(found)) == json.loads(json.dumps(found, allow_nan=False))


def test_advice_reads_the_figures_it_has() -> None:
    analysis = analyze(history(walks(4)), draws=40)
    assert any("random walk" in sentence for sentence in analysis.advice)
    turned = Figure(-0.6, None, 1, Null(0.0, -0.1, 0.1))
    sentences = advice(dataclasses.replace(analysis, overall=Group((name(0),), {"cosine_local": turned})))
    assert "turns back" in sentences[0]
    assert "-0.600" in sentences[0]
    few = analyze(history(dense_run({name(0): drift(0)}, (10, 20))))
    assert "2 checkpoints" in few.advice[0]

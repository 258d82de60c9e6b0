"""A run's deltas agree with direct computation, and are compressed only on demand."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from next_core.compressors.exact import ExactCompressor
from next_core.errors import CheckpointError
from next_core.history import matrix_tasks
from next_core.history.history import DeltaKind, History
from next_core.interfaces import Compressor
from next_core.mathematics.low_rank import Factors, LowRank
from next_core.sources.memory import MemorySource
from next_core.types import LoraFactors
from tests.errors import raises_kind

STEPS = (10, 20, 30, 50)
SHAPES = {"a": (6, 5), "b": (5, 6), "c": (6, 5), "d": (6, 5), "still": (6, 5)}


def noise(seed: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(seed)) % 2**31)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def factors(name: str, step: int) -> LoraFactors:
    """Both factors move, the motion bends, ``d`` has another rank than the rest, and the first row of ``c`` is zero."""
    m, n = SHAPES[name]
    r = 3 if name == "d" else 2
    t = 30 if name == "still" else step
    A = noise(name + "A", r, n) + 0.01 * t * noise(name + "dA", r, n)
    B = 0.01 * t * noise(name + "B", m, r) + 0.02 * noise(f"{name}{t}", m, r)
    if name == "c":
        B[0] = 0
    return LoraFactors(A, B, scaling=2.0)


def moved(name: str, step: int | None) -> Tensor:
    at = None if step is None else factors(name, step)
    return torch.zeros(SHAPES[name], dtype=torch.float64) if at is None else at.scaling * at.B @ at.A


def lora_run(steps: Sequence[int] = STEPS) -> MemorySource:
    metrics = {18: {"reward": 0.1}, 20: {"reward": 0.2}, 35: {"reward": 0.35, "loss": 1.0}}
    return MemorySource({step: {name: factors(name, step) for name in SHAPES} for step in steps}, metrics=metrics)


def full_run(steps: Sequence[int] = STEPS) -> MemorySource:
    backbone = {name: noise(name + "W", *shape) for name, shape in SHAPES.items()}
    return MemorySource({t: {name: W + moved(name, t) for name, W in backbone.items()} for t in steps}, backbone)


@pytest.fixture(params=[lora_run, full_run], ids=["lora", "full"])
def source(request: pytest.FixtureRequest) -> MemorySource:
    made: MemorySource = request.param()
    return made


class Counting(Compressor):
    """Does not share factors between deltas, and counts what it compresses."""

    name = "counting"

    def __init__(self) -> None:
        super().__init__()
        self.deltas, self.largest = 0, 0
        self.ranks: set[int] = set()

    def compress(self, deltas: Sequence[LowRank | Tensor], rank: int) -> Factors:
        self.deltas += len(deltas)
        self.largest = max(self.largest, len(deltas))
        self.ranks.add(rank)
        return ExactCompressor().compress(deltas, rank)


def spans(kind: DeltaKind) -> list[tuple[int, int | None]]:
    return {
        "global": [(10, None), (20, None), (30, None), (50, None)],
        "local": [(10, None), (20, 10), (30, 20), (50, 30)],
        "target": [(30, 10), (50, 30)],
    }[kind]


@pytest.mark.parametrize("kind", ["global", "local", "target"])
@pytest.mark.parametrize("rank", [1, 2])
def test_components_are_leading_triplets_of_dense_deltas(source: MemorySource, kind: DeltaKind, rank: int) -> None:
    history = History(source, rank, ExactCompressor())
    found = history.components(kind, 20 if kind == "target" else None)
    assert set(found) == {"a", "b", "c", "d"}
    for name, components in found.items():
        m, n = SHAPES[name]
        count = len(spans(kind))
        assert components.U.shape == (count, m, rank)
        assert components.S.shape == (count, rank)
        assert components.V.shape == (count, n, rank)
        for row, (step, since) in enumerate(spans(kind)):
            dense = moved(name, step) - moved(name, since)
            U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
            best = U[:, :rank] * S[:rank] @ Vh[:rank]
            torch.testing.assert_close(components.S[row], S[:rank], atol=1e-9, rtol=1e-7)
            torch.testing.assert_close(components.lowrank().dense()[row], best, atol=1e-8, rtol=1e-6)
            torch.testing.assert_close(components.energy[row], dense.square().sum(), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("kind", ["global", "local", "target"])
def test_signs_follow_the_newest_global_delta_backwards(source: MemorySource, kind: DeltaKind) -> None:
    history = History(source)
    reference = history.components("global")
    for name, components in history.components(kind, 20 if kind == "target" else None).items():
        u, v = reference[name].U[-1, :, 0], reference[name].V[-1, :, 0]
        for row in reversed(range(components.S.shape[0])):
            assert components.U[row, :, 0] @ u + components.V[row, :, 0] @ v >= 0
            u, v = components.U[row, :, 0], components.V[row, :, 0]


def test_the_reference_for_signs_is_the_newest_global_delta_where_checkpoints_have_nothing_in_common() -> None:
    checkpoints = {step: {name: noise(f"{name}{step}", 6, 5) for name in "ae"} for step in STEPS}
    start = dict.fromkeys("ae", torch.zeros(6, 5, dtype=torch.float64))
    history = History(MemorySource(checkpoints, start))
    for name, reference in history.components("global").items():
        for kind, horizon in (("local", None), ("target", 20)):
            found = history.components(kind, horizon)[name]
            assert (found.U[-1] * reference.U[-1]).sum() + (found.V[-1] * reference.V[-1]).sum() > 0


def test_gram_matrices_are_the_inner_products_of_global_deltas(source: MemorySource) -> None:
    grams = History(source).grams()
    for name in ("a", "b", "c", "d"):
        rows = torch.stack([moved(name, step).flatten() for step in STEPS])
        torch.testing.assert_close(grams[name], rows @ rows.T, atol=1e-9, rtol=1e-9)
        assert grams[name].dtype == torch.float64


def test_gram_matrices_of_chosen_steps_are_computed_once(source: MemorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(source)
    gram = history.matrix("b").gram((50, 10))
    rows = torch.stack([moved("b", step).flatten() for step in (50, 10)])
    torch.testing.assert_close(gram, rows @ rows.T, atol=1e-9, rtol=1e-9)
    monkeypatch.setattr(source, "delta", None)
    assert history.matrix("b").gram((50, 10)) is gram


def test_pairs_are_the_targets_that_were_observed(source: MemorySource) -> None:
    history = History(source)
    assert history.pairs(10) == [(0, 1), (1, 2)]
    assert history.pairs(20) == [(0, 2), (2, 3)]
    assert history.pairs(7) == []
    assert history.components("target", 7) == {}


def test_what_did_not_move_is_frozen_with_the_reason_and_never_compressed(source: MemorySource) -> None:
    history = History(source)
    assert history.names == ("a", "b", "c", "d")
    assert history.frozen == {"still": "did not move since step 30"}
    assert "still" not in history.components("global")
    assert "still" not in history.grams()


def test_with_one_checkpoint_what_is_at_the_backbone_is_frozen() -> None:
    A, B = noise("A", 2, 5), noise("B", 6, 2)
    sparse = LoraFactors(A * torch.eye(2, 5), B * torch.eye(6, 2), 2.0)
    no_B, no_A = LoraFactors(A, 0 * B, 2.0), LoraFactors(0 * A, B, 2.0)
    history = History(MemorySource({10: {"sparse": sparse, "no B": no_B, "no A": no_A}}))
    assert history.names == ("sparse",)
    assert set(history.frozen) == {"no A", "no B"}
    assert "the backbone" in history.frozen["no A"]


def test_one_entry_that_moves_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("next_core.history.history.BLOCK", 1)  # a block for each row
    still = torch.zeros(6, 5)
    moving = still.clone()
    moving[5, 4] = 1
    assert History(MemorySource({10: {"a": still, "b": still}, 20: {"a": moving, "b": still}})).names == ("a",)


@pytest.mark.parametrize("side", ["A", "B"])
def test_one_factor_that_moves_is_enough(side: str) -> None:
    first, later = factors("a", 10), factors("a", 20)
    moving = dataclasses.replace(first, **{side: getattr(later, side)})
    assert History(MemorySource({10: {"a": first}, 20: {"a": moving}})).names == ("a",)
    assert History(MemorySource({10: {"a": first}, 20: {"a": first}})).names == ()


def test_an_adapter_that_was_trained_before_is_frozen_where_it_began() -> None:
    class Trained(MemorySource):
        def start(self, name: str) -> LoraFactors:
            return factors(name, 10)

    history = History(Trained({20: {"a": factors("a", 10), "b": factors("b", 20)}}))
    assert history.names == ("b",)


def test_nothing_is_compressed_until_it_is_asked_for_and_then_once(source: MemorySource) -> None:
    counting = Counting()
    history = History(source, 2, counting)
    history.grams()
    assert counting.deltas == 0
    history.components("global")
    assert counting.deltas == 4 * len(STEPS)
    history.components("global")
    history.components("global", align=False)
    assert counting.deltas == 4 * len(STEPS)
    history.components("local")
    assert counting.deltas == 8 * len(STEPS)
    history.components("target", 10)
    history.components("target", 20)
    history.components("target", 10, align=False)
    history.compress("global", "local", "target", horizon=10)
    assert counting.deltas == 8 * len(STEPS) + 4 * 2 + 4 * 2
    assert counting.ranks == {2}


def test_one_pass_serves_several_kinds_and_decomposes_no_delta_twice(source: MemorySource) -> None:
    counting = Counting()
    history = History(source, 1, counting)
    history.compress("global", "local", "target", horizon=20)
    # The first local delta is the first global one, and the last target the last local one.
    assert counting.deltas == 4 * (4 + 3 + 1)
    alone = History(source, 1, ExactCompressor())
    for kind in ("global", "local", "target"):
        horizon = 20 if kind == "target" else None
        for name, found in history.components(kind, horizon).items():
            expected = alone.components(kind, horizon)[name]
            torch.testing.assert_close(found.lowrank().dense(), expected.lowrank().dense())
    assert counting.deltas == 4 * (4 + 3 + 1)


def test_one_pass_reads_the_factors_of_each_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = lora_run()
    history = History(source)
    read: list[tuple[str, int]] = []
    factors_of = source.factors
    monkeypatch.setattr(source, "factors", lambda name, step: (read.append((name, step)), factors_of(name, step))[1])
    history.compress("global", "local", "target", horizon=20)
    assert sorted(read) == sorted((name, step) for name in history.names for step in STEPS)


def test_dense_deltas_are_decomposed_one_at_a_time() -> None:
    counting = Counting()
    History(full_run(), 1, counting).components("global")
    assert counting.largest == 1


def test_dense_inner_products_are_summed_over_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = History(full_run()).grams()
    monkeypatch.setattr(matrix_tasks, "BLOCK_BYTES", 1)
    blocked = History(full_run()).grams()
    for name in whole:
        torch.testing.assert_close(blocked[name], whole[name])


def test_the_default_compressor_is_exact_for_lora_and_lanczos_where_a_matrix_is_dense() -> None:
    mixed = {step: {"a": moved("a", step), "b": factors("b", step)} for step in STEPS}
    source = MemorySource(mixed, {"a": torch.zeros(SHAPES["a"], dtype=torch.float64)})
    names = [History(run).compressor.name for run in (lora_run(), full_run(), source)]
    assert names == ["exact", "lanczos", "lanczos"]


@pytest.mark.parametrize("run", [lora_run, full_run])
def test_the_full_spectrum_is_known_only_on_request(run: type) -> None:
    assert History(run()).components("global")["a"].nuclear is None
    found = History(run(), spectrum=True).components("global")["a"]
    torch.testing.assert_close(found.nuclear[0], torch.linalg.svdvals(moved("a", 10)).sum())


def test_metrics_come_per_checkpoint_with_none_where_nothing_was_logged_since_the_one_before() -> None:
    history = History(lora_run())
    assert history.metrics("reward") == [None, 0.2, None, 0.35]
    assert history.matrix("a").metrics("loss") == [None, None, None, 1.0]


def test_an_empty_run_and_wrong_arguments_are_refused() -> None:
    with raises_kind("checkpoint-no-history"):
        History(MemorySource({}))
    with raises_kind("config-invalid-value", "rank", "0"):
        History(lora_run(), rank=0)
    for kind, horizon in (("global", 10), ("local", 10), ("target", None)):
        with raises_kind("config-contradiction", "horizon"):
            History(lora_run()).components(kind, horizon)
    with pytest.raises(CheckpointError, match="15"):
        History(lora_run()).grams((10, 15))


def test_a_rank_beyond_the_matrix_gives_as_many_components_as_there_are(source: MemorySource) -> None:
    components = History(source, 9).components("global")["a"]
    assert components.S.shape == (4, 5)
    torch.testing.assert_close(components.lowrank().dense()[0], moved("a", 10), atol=1e-9, rtol=1e-7)


def test_unaligned_components_are_the_compressors_before_and_after_alignment(source: MemorySource) -> None:
    first = {name: found.U.clone() for name, found in History(source).components("local", align=False).items()}
    history = History(source)
    aligned = {name: found.U.clone() for name, found in history.components("local").items()}
    for name, found in history.components("local", align=False).items():
        assert torch.equal(found.U, first[name])
        assert torch.equal(found.U.abs(), aligned[name].abs())
        again = history.components("local")[name]
        assert torch.equal(again.U, aligned[name])
        torch.testing.assert_close(found.lowrank().dense(), again.lowrank().dense())

"""``PredictExtendCallback`` in the real GRPOTrainer and RLOOTrainer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from next_backends.trl import PredictExtendCallback
from next_backends.trl.applied_jump import TrlApplied
from next_backends.trl.argument_checks import check_best_model
from next_core import Abstain, LowRankUpdate, matrix_predictor, open_checkpoints
from next_core.interfaces import CoefficientUpdate, Prediction
from next_core.live_weights.in_memory import InMemoryApplier, jump_adapters
from next_core.mathematics.low_rank import LowRank
from next_core.plugins import resolve_predictor
from next_core.run_config import Schedule
from tests.backends.trl.conftest import BASE
from tests.errors import raises_kind
from tests.fuzz.adapters import Draw, base_model, write_run

pytestmark = pytest.mark.trl

SMALL = {"observe": 6, "every": 3, "horizon": 3, "settle": 2}
MERGED = {"name": "secant", "window": 3, "space": "merged"}
FACTORS = {"name": "secant", "window": 3, "space": "factors"}


class Watch(TrainerCallback):
    """Calls ``look(step, model)`` before the jump's callback and after it, when put on both sides of it."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(state.global_step, kwargs["model"])


class Gradients(TrainerCallback):
    """Notes which tensors hold a gradient when the norm is clipped."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tensors = [*kwargs["model"].named_parameters(), *kwargs["model"].named_buffers()]
        self.names |= {name for name, tensor in tensors if tensor.grad is not None}


def weights(model: Any) -> dict[str, torch.Tensor]:
    """The effective weight of every linear layer: base plus all active adapters, fp64."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            delta = sum(module.get_delta_weight(adapter).double() for adapter in module.active_adapters)
            found[name] = module.get_base_layer().weight.detach().double() + delta
        elif isinstance(module, torch.nn.Linear) and "lora" not in name and "base_layer" not in name:
            found[name] = module.weight.detach().double().clone()
    return found


RANKS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}, "use_rslora": True}


@pytest.mark.parametrize(
    ("predictor", "lora"), [(FACTORS, True), (MERGED, RANKS), (MERGED, False)], ids=["factors", "merged", "full"]
)
def test_log_probabilities_move_by_the_jump_and_only_by_it(
    make_trainer: Any, logits: Any, tmp_path: Path, predictor: dict[str, Any], lora: Any
) -> None:
    seen: dict[str, dict[int, Any]] = {"before": {}, "after": {}, "before_w": {}, "after_w": {}}

    def look(when: str) -> Any:
        def note(step: int, model: Any) -> None:
            seen[when][step] = logits(model)
            seen[when + "_w"][step] = weights(model)

        return note

    callback = PredictExtendCallback(predictor, alpha=2.0, guards={"max_norm_ratio": 100}, **SMALL)
    trainer = make_trainer([Watch(look("before")), callback, Watch(look("after"))], steps=9, lora=lora)
    trainer.train()

    assert [jump["accepted"] for jump in callback.journal.jumps()] == [True]
    for step in range(1, 10):
        same = torch.equal(seen["before"][step], seen["after"][step])
        assert same == (step != 6), f"step {step}"
    # The weights moved by 2 (W_6 - W_3), as the checkpoints say, and nothing else moved.
    source = open_checkpoints(tmp_path / "trainer" / "next-core" / "checkpoints")
    for name, before in seen["before_w"][6].items():
        moved = seen["after_w"][6][name] - before
        parameter = name.removeprefix("base_model.model.") + ".weight"
        if parameter not in {p.name for p in source.parameters}:
            assert not moved.any(), name
            continue
        if predictor is MERGED:
            # The source counts the jump into earlier checkpoints; the difference of two is what RL did.
            delta = source.delta(parameter, 6, since=3)
            wanted = 2.0 * (delta.dense() if isinstance(delta, LowRank) else delta)
            torch.testing.assert_close(moved, wanted.to(moved.dtype), atol=1e-6, rtol=1e-4)
        assert moved.norm() > 0


def test_the_trained_adapter_of_a_factor_jump_is_where_the_coefficients_say(make_trainer: Any, trained: Any) -> None:
    seen: dict[int, Any] = {}
    after: dict[int, Any] = {}
    callback = PredictExtendCallback(FACTORS, alpha=3.0, guards={"max_norm_ratio": 100}, **SMALL)
    watchers = [
        Watch(lambda step, model: seen.__setitem__(step, trained(model))),
        callback,
        Watch(lambda step, model: after.__setitem__(step, trained(model))),
    ]
    make_trainer(watchers, steps=9).train()
    for name, value in seen[6].items():
        wanted = value + 3.0 * (value - seen[3][name])
        torch.testing.assert_close(after[6][name], wanted, atol=1e-6, rtol=1e-5)


def test_a_jump_adapter_never_gets_gradients_and_never_changes(make_trainer: Any) -> None:
    jumped: dict[int, dict[str, torch.Tensor]] = {}
    gradients = Gradients()

    def look(step: int, model: Any) -> None:
        jumped[step] = {name: t.detach().clone() for name, t in model.state_dict().items() if ".jump-1." in name}

    callback = PredictExtendCallback(MERGED, **SMALL)
    trainer = make_trainer([callback, Watch(look), gradients], steps=9, beta=0.05)
    trainer.train()

    assert jump_adapters(trainer.model) == ["jump-1"]
    assert jumped[6]
    for name, value in jumped[6].items():
        assert torch.equal(value, jumped[9][name])
    assert not any(".jump-1." in name for name in gradients.names)
    assert any(".default." in name for name in gradients.names)
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    named = {id(t): name for name, t in [*trainer.model.named_parameters(), *trainer.model.named_buffers()]}
    assert not any(".jump-1." in named[i] for i in in_optimizer if i in named)


@pytest.mark.parametrize("predictor", [FACTORS, MERGED], ids=["factors", "merged"])
def test_the_reference_policy_stays_the_original_model(make_trainer: Any, logits: Any, predictor: Any) -> None:
    trainer = make_trainer([PredictExtendCallback(predictor, **SMALL)], steps=9, beta=0.05)
    with trainer.model.disable_adapter():
        original = logits(trainer.model)
    trainer.train()
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), original)
    assert not torch.equal(logits(trainer.model), original)


def test_merging_and_unmerging_keeps_the_jump(make_trainer: Any, logits: Any) -> None:
    trainer = make_trainer([PredictExtendCallback(MERGED, **SMALL)], steps=9)
    trainer.train()
    model = trainer.model
    before = logits(model)
    for _ in range(3):
        model.merge_adapter()
        torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    assert model.base_model.active_adapters == ["default", "jump-1"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".jump-1." in name)


@pytest.mark.parametrize("predictor", [FACTORS, MERGED], ids=["factors", "merged"])
def test_resume_from_checkpoint_brings_the_jump_back_and_ends_where_the_whole_run_ends(
    make_trainer: Any, logits: Any, trained: Any, predictor: Any
) -> None:
    schedule = SMALL | {"jump_every": 6, "settle": 0}
    saving = {"save_strategy": "steps", "save_steps": 9}
    whole = make_trainer([PredictExtendCallback(predictor, **schedule)], steps=15, **saving)
    whole.train()

    begun: dict[str, torch.Tensor] = {}

    class Begin(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun["logits"] = logits(kwargs["model"])

    saved: dict[int, torch.Tensor] = {}
    again = PredictExtendCallback(predictor, **schedule)
    resumed = make_trainer(
        [again, Begin(), Watch(lambda step, model: saved.__setitem__(step, logits(model)))], steps=15, **saving
    )
    checkpoint = Path(resumed.args.output_dir) / "checkpoint-9"
    if predictor is MERGED:
        assert (checkpoint / "jump-1" / "adapter_model.safetensors").exists()
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert [jump["step"] for jump in again.journal.jumps()] == [6, 12]
    for name, value in trained(whole.model).items():
        assert torch.equal(value, trained(resumed.model)[name]), name
    assert torch.equal(logits(whole.model), logits(resumed.model))
    if predictor is MERGED:
        assert jump_adapters(resumed.model) == ["jump-1", "jump-2"]
        assert not torch.equal(begun["logits"], logits(whole.model))


def test_a_resume_from_a_checkpoint_of_another_run_is_refused(make_trainer: Any, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 9}
    make_trainer([], steps=9, out="other", **saving).train()
    make_trainer([PredictExtendCallback(MERGED, **SMALL)], steps=9).train()
    trainer = make_trainer([PredictExtendCallback(MERGED, **SMALL)], steps=12)
    with raises_kind("checkpoint-other-model", "jump-1"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-9"))


@pytest.mark.parametrize(
    ("predictor", "lora"), [(FACTORS, True), (MERGED, True), (MERGED, False)], ids=["factors", "merged", "full"]
)
def test_a_rolled_back_jump_leaves_a_plain_run_bit_for_bit(
    make_trainer: Any, logits: Any, plain_logits: Any, predictor: Any, lora: bool
) -> None:
    measured = iter([0.9, 0.1])  # the probe falls from .9 to .1: far more than max_drop
    callback = PredictExtendCallback(predictor, evaluate=lambda model: next(measured), **SMALL)
    seen: dict[str, torch.Tensor] = {}

    def keep(key: str) -> Any:
        return lambda step, model: seen.__setitem__(key, logits(model)) if step == 6 else None

    jumping = make_trainer([Watch(keep("before")), callback, Watch(keep("after"))], steps=8, lora=lora)
    jumping.train()
    (jump,) = callback.journal.jumps()
    assert not jump["accepted"]
    assert "rolled back" in jump["reason"]
    assert torch.equal(seen["before"], seen["after"])
    assert torch.equal(logits(jumping.model), plain_logits(8, lora))


@pytest.mark.parametrize(
    ("predictor", "lora"), [(FACTORS, True), (MERGED, True), (MERGED, False)], ids=["factors", "merged", "full"]
)
def test_a_jump_that_does_not_recover_is_rolled_back_with_its_optimizer_state(
    make_trainer: Any, logits: Any, predictor: Any, lora: bool
) -> None:
    measured = iter([0.5, 0.5, 0.3])  # before, right after, after recovery
    callback = PredictExtendCallback(
        predictor, evaluate=lambda model: next(measured), guards={"recovery": 3}, **SMALL | {"settle": 3}
    )
    seen: dict[str, torch.Tensor] = {}
    moments: dict[str, list[torch.Tensor]] = {}
    holder: dict[str, Any] = {}

    def moment() -> list[torch.Tensor]:
        state = holder["trainer"].optimizer.state
        return [s["exp_avg"].clone() for s in state.values() if "exp_avg" in s]

    def before(step: int, model: Any) -> None:
        if step == 6:
            seen["before"], moments["before"] = logits(model), moment()

    def after(step: int, model: Any) -> None:
        if step == 9:
            seen["after"], moments["after"] = logits(model), moment()

    holder["trainer"] = make_trainer([Watch(before), callback, Watch(after)], steps=12, lora=lora)
    holder["trainer"].train()
    (jump,) = callback.journal.jumps()
    assert not jump["accepted"]
    assert torch.equal(seen["before"], seen["after"])
    assert all(torch.equal(a, b) for a, b in zip(moments["before"], moments["after"], strict=True))


@matrix_predictor("explode", anchor="newest")
def explode(matrix: Any, horizon: int, config: Any) -> LowRankUpdate:
    m, n = matrix.shape
    return LowRankUpdate(LowRank(torch.full((m, 1), 1e6), torch.ones(1, n)))


@matrix_predictor("raise", anchor="newest")
def fail(matrix: Any, horizon: int, config: Any) -> Abstain:
    raise ZeroDivisionError("a predictor's own mistake")


@matrix_predictor("nan", anchor="newest")
def nan(matrix: Any, horizon: int, config: Any) -> CoefficientUpdate:
    return CoefficientUpdate({matrix.steps[-1]: float("nan")})


@pytest.mark.parametrize(
    ("predictor", "reason"), [(explode, "times the motion"), (fail, "own mistake"), (nan, "finite")]
)
def test_a_bad_prediction_is_refused_with_its_reason_and_leaves_a_plain_run(
    make_trainer: Any, logits: Any, plain_logits: Any, predictor: Any, reason: str
) -> None:
    callback = PredictExtendCallback(predictor, **SMALL)
    jumping = make_trainer([callback], steps=8)
    jumping.train()
    (jump,) = callback.journal.jumps()
    assert not jump["accepted"]
    assert reason in jump["reason"]
    assert torch.equal(logits(jumping.model), plain_logits(8, True))


def test_rloo_jumps_too(make_trainer: Any, logits: Any) -> None:
    seen: dict[str, torch.Tensor] = {}
    callback = PredictExtendCallback(FACTORS, **SMALL)
    trainer = make_trainer(
        [
            Watch(lambda s, m: seen.__setitem__("before", logits(m)) if s == 6 else None),
            callback,
            Watch(lambda s, m: seen.__setitem__("after", logits(m)) if s == 6 else None),
        ],
        steps=8,
        rloo=True,
    )
    trainer.train()
    assert [jump["accepted"] for jump in callback.journal.jumps()] == [True]
    assert not torch.equal(seen["before"], seen["after"])


def test_a_jump_inside_a_generation_is_refused_before_training(make_trainer: Any) -> None:
    reuse = {"num_iterations": 2, "steps_per_generation": 2}  # one generation serves four steps
    with raises_kind("config-schedule", "step 6", "multiples of 4"):
        make_trainer([PredictExtendCallback(FACTORS, **SMALL)], steps=12, **reuse).train()
    fits = {"observe": 4, "every": 4, "horizon": 4, "settle": 4}
    with raises_kind("config-schedule", "guards.recovery multiples of 4"):
        make_trainer([PredictExtendCallback(FACTORS, guards={"recovery": 3}, **fits)], steps=12, **reuse).train()


def test_a_jump_at_a_generation_boundary_is_made(make_trainer: Any) -> None:
    callback = PredictExtendCallback(FACTORS | {"window": 4}, observe=8, every=4, horizon=4, settle=2)
    make_trainer([callback], steps=12, num_iterations=2, steps_per_generation=2).train()
    assert [jump["step"] for jump in callback.journal.jumps() if jump["accepted"]] == [8]


def test_a_run_with_a_reference_adapter_takes_factor_jumps_and_refuses_the_others(
    make_trainer: Any, tokenizer: Any
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def model() -> Any:
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), config)

    callback = PredictExtendCallback(FACTORS, **SMALL)
    make_trainer([callback], steps=8, lora=False, model=model(), beta=0.05).train()
    assert [jump["accepted"] for jump in callback.journal.jumps()] == [True]
    trainer = make_trainer(
        [PredictExtendCallback(MERGED, **SMALL)], out="refused", lora=False, model=model(), beta=0.05
    )
    with raises_kind("backend-unsupported", "'ref'", "space: factors"):
        trainer.train()
    assert trainer.state.global_step == 0


TOKENS = {"trainable_token_indices": [1, 2]}
MODULES = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}


@pytest.mark.parametrize(("predictor", "lora"), [(FACTORS, TOKENS), (FACTORS, MODULES), (MERGED, MODULES)])
def test_jumps_next_to_tokens_and_modules_that_train_are_made_and_saved(
    make_trainer: Any, tmp_path: Path, predictor: Any, lora: dict[str, Any]
) -> None:
    callback = PredictExtendCallback(predictor, guards={"max_norm_ratio": None}, **SMALL)
    make_trainer([callback], steps=8, lora=lora, save_strategy="steps", save_steps=8).train()
    assert [jump["accepted"] for jump in callback.journal.jumps()] == [True]
    assert (tmp_path / "trainer/checkpoint-8/adapter_model.safetensors").is_file()


def test_jumps_that_every_later_save_would_fail_at_are_refused_before_training(make_trainer: Any) -> None:
    trainer = make_trainer([PredictExtendCallback(MERGED, **SMALL)], lora=TOKENS)
    with raises_kind("backend-unsupported", "trainable_tokens", "space: factors"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings")
def test_undoing_a_jump_restores_parameters_that_share_their_values(tmp_path: Path) -> None:
    """With ``ensure_weight_tying`` PEFT trains one tensor as a factor of the head and of the embedding."""
    from peft import PeftModel

    lora = {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    base = base_model("qwen2 tied", tmp_path)
    write_run(Draw(3, "qwen2 tied", lora, "default", 1.0, start=False), base, tmp_path / "run")
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "run/checkpoint-20", is_trainable=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = open_checkpoints(tmp_path / "run")
    moves = {p.name: CoefficientUpdate({20: 1.0, 10: -1.0}, "factors") for p in source.parameters}
    live = InMemoryApplier().apply(Prediction(source, 20, 10, updates=moves), out=model)
    table = model.base_model.model.model.embed_tokens.lora_embedding_A["default"]
    assert not torch.equal(table, before["base_model.model.model.embed_tokens.lora_embedding_A.default"])
    TrlApplied(model, torch.optim.AdamW(model.parameters()), live, tmp_path).rollback()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fused_experts_are_moved_in_their_factors_and_refused_in_merged_space(
    make_trainer: Any, tmp_path: Path
) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4}
    lora = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 2}

    def trainer(predictor: Any, out: str) -> Any:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, vocab_size=19, num_experts_per_tok=2))
        return make_trainer([predictor], out=out, steps=8, lora=lora, model=model)

    callback = PredictExtendCallback(FACTORS, guards={"max_norm_ratio": None}, **SMALL)
    made = trainer(callback, "factors")
    made.train()
    assert [jump["accepted"] for jump in callback.journal.jumps()] == [True]
    source = open_checkpoints(tmp_path / "factors/next-core/checkpoints")
    assert len(source.parameters) == 1 + 2 * 4
    refused = trainer(PredictExtendCallback(MERGED, **SMALL), "merged")
    with raises_kind("backend-unsupported", "experts", "space: factors"):
        refused.train()


@pytest.mark.parametrize(
    ("predictor", "lora", "average", "refused"),
    [
        (FACTORS, True, None, None),
        (FACTORS, True, 8, "average"),
        (MERGED, True, None, "space: factors"),
        (MERGED, False, None, None),
        ("next-mlp", True, None, "space: factors"),
    ],
)
def test_loading_the_best_model_at_the_end_is_refused_where_it_would_undo_jumps(
    tmp_path: Path, predictor: Any, lora: bool, average: int | None, refused: str | None
) -> None:
    from trl import GRPOConfig

    steps: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    args = GRPOConfig(str(tmp_path), load_best_model_at_end=True, use_cpu=True, bf16=False, **steps)
    schedule = Schedule(**SMALL, average=average)
    space = resolve_predictor(predictor)().space
    if refused is None:
        check_best_model(args, schedule, space, lora)
    else:
        with raises_kind("config-contradiction", "load_best_model_at_end", refused):
            check_best_model(args, schedule, space, lora)
        check_best_model(GRPOConfig(str(tmp_path), use_cpu=True, bf16=False), schedule, space, lora)


def test_a_training_whose_jumps_loading_the_best_model_would_undo_is_refused(make_trainer: Any) -> None:
    trainer = make_trainer([PredictExtendCallback(MERGED, **SMALL)])
    trainer.args.load_best_model_at_end = True
    with raises_kind("config-contradiction", "load_best_model_at_end"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_journal_and_the_metrics_are_on_disk(make_trainer: Any, tmp_path: Path) -> None:
    callback = PredictExtendCallback(FACTORS, folder=tmp_path / "watch", **SMALL)
    make_trainer([callback], steps=8).train()
    lines = [json.loads(line) for line in (tmp_path / "watch" / "journal.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "jump", "advice"]
    source = open_checkpoints(tmp_path / "watch" / "checkpoints")
    assert source.steps == (3, 6)
    assert "reward" in source.metrics(6)


@pytest.mark.parametrize(
    ("fields", "kind", "name"),
    [
        ({"observe": 7, "every": 3}, "config-contradiction", "observe (7)"),
        ({"every": 0}, "config-invalid-value", "every"),
        ({"obzerve": 6}, "config-unknown-key", "'observe'"),
        ({"predictor": {"name": "secant", "windw": 3}}, "config-unknown-key", "'window'"),
        ({"guards": {"recovery": 3, "probe": False}}, "config-contradiction", "probe"),
        ({"guards": {"recovery": 3}}, "config-schedule", "guards.recovery (3)"),
        ({"rank": 0}, "config-invalid-value", "rank"),
        ({"predictor": 5}, "plugin-invalid", "5"),
    ],
)
def test_wrong_settings_are_named_when_the_callback_is_made(fields: dict[str, Any], kind: str, name: str) -> None:
    with raises_kind(kind, name):
        PredictExtendCallback(**{"predictor": "secant", **fields})


def test_no_room_for_a_jump_is_said_before_training(make_trainer: Any) -> None:
    with raises_kind("config-schedule", "observe (9)", "12 steps"):
        make_trainer([PredictExtendCallback(FACTORS, observe=9, every=3, settle=6)], steps=12).train()


def test_a_full_parameter_run_in_bf16_is_refused(make_trainer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    with raises_kind("backend-unsupported", "float32"):
        make_trainer([PredictExtendCallback(MERGED, **SMALL)], steps=8, lora=False, model=model).train()

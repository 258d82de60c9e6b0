"""``PredictExtendCallback`` in the real GRPOTrainer and RLOOTrainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerState

from next_backends.trl import PredictExtendCallback
from next_core import open_checkpoints
from next_core.live_weights.frozen_adapters import jump_adapters
from next_core.mathematics.low_rank import LowRank
from tests.backends.trl.conftest import BASE, FACTORS, MERGED, SMALL, Watch, adapted, jumping, of_each_kind
from tests.errors import raises_kind

pytestmark = pytest.mark.trl


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
    make_trainer: Any, logits: Any, trained: Any, tmp_path: Path, predictor: dict[str, Any], lora: Any
) -> None:
    seen: dict[str, dict[int, Any]] = {what + when: {} for what in ("", "w_", "own_") for when in ("before", "after")}

    def look(when: str) -> Any:
        def note(step: int, model: Any) -> None:
            seen[when][step] = logits(model)
            seen["w_" + when][step] = weights(model)
            seen["own_" + when][step] = trained(model)

        return note

    callback = jumping(predictor, alpha=2.0, guards={"max_norm_ratio": 100})
    trainer = make_trainer([Watch(look("before")), callback, Watch(look("after"))], steps=9, lora=lora)
    trainer.train()

    assert [jump["accepted"] for jump in callback.journal.jumps()] == [True]
    for step in range(1, 10):
        same = torch.equal(seen["before"][step], seen["after"][step])
        assert same == (step != 6), f"step {step}"
    if predictor is FACTORS:
        for name, value in seen["own_before"][6].items():
            wanted = value + 2.0 * (value - seen["own_before"][3][name])
            torch.testing.assert_close(seen["own_after"][6][name], wanted, atol=1e-6, rtol=1e-5)
    # The weights moved by 2 (W_6 - W_3), as the checkpoints say, and nothing else moved.
    source = open_checkpoints(tmp_path / "trainer" / "next-core" / "checkpoints")
    for name, before in seen["w_before"][6].items():
        moved = seen["w_after"][6][name] - before
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


def test_a_jump_adapter_stays_as_made_beside_the_original_reference_policy(make_trainer: Any, logits: Any) -> None:
    jumped: dict[int, dict[str, torch.Tensor]] = {}
    gradients = Gradients()

    def look(step: int, model: Any) -> None:
        jumped[step] = {name: t.detach().clone() for name, t in model.state_dict().items() if ".jump-1." in name}

    callback = jumping(MERGED, overwrite=True)
    trainer = make_trainer([callback, Watch(look), gradients], steps=9, beta=0.05)
    model = trainer.model
    with model.disable_adapter():
        original = logits(model)
    trainer.train()

    with model.disable_adapter():
        assert torch.equal(logits(model), original)
    assert not torch.equal(logits(model), original)
    assert jump_adapters(model) == ["jump-1"]
    assert jumped[6]
    for name, value in jumped[6].items():
        assert torch.equal(value, jumped[9][name])
    assert not any(".jump-1." in name for name in gradients.names)
    assert any(".default." in name for name in gradients.names)
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    named = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    assert not any(".jump-1." in named[i] for i in in_optimizer if i in named)

    before = logits(model)
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    assert model.base_model.active_adapters == ["default", "jump-1"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".jump-1." in name)
    with raises_kind("backend-unsupported", "jump adapters"):  # a new training must not take them for its own
        trainer.train()


def test_a_resumed_run_has_the_jump_and_ends_as_the_whole_run(make_trainer: Any, logits: Any, trained: Any) -> None:
    schedule = SMALL | {"jump_every": 6, "settle": 0}
    saving = {"save_strategy": "steps", "save_steps": 9}
    whole = make_trainer([PredictExtendCallback(MERGED, **schedule)], steps=12, **saving)
    whole.train()

    again = PredictExtendCallback(MERGED, **schedule)
    resumed = make_trainer([again], steps=12, **saving)
    checkpoint = Path(resumed.args.output_dir) / "checkpoint-9"
    assert (checkpoint / "jump-1" / "adapter_model.safetensors").exists()
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert [jump["step"] for jump in again.journal.jumps()] == [6, 12]
    assert jump_adapters(resumed.model) == ["jump-1", "jump-2"]
    for name, value in trained(whole.model).items():
        assert torch.equal(value, trained(resumed.model)[name]), name
    assert torch.equal(logits(whole.model), logits(resumed.model))


@of_each_kind
def test_a_refused_jump_leaves_no_trace(
    make_trainer: Any, logits: Any, plain_logits: Any, predictor: Any, lora: bool
) -> None:
    measured = iter([0.9, 0.1])  # the probe falls from .9 to .1: far more than max_drop
    callback = jumping(predictor, evaluate=lambda model: next(measured))
    trainer = make_trainer([callback], steps=8, lora=lora)
    trainer.train()
    (jump,) = callback.journal.jumps()
    assert not jump["accepted"]
    assert "rolled back" in jump["reason"]
    assert torch.equal(logits(trainer.model), plain_logits(8, lora))


@of_each_kind
def test_a_failed_recovery_restores_the_moments(make_trainer: Any, logits: Any, predictor: Any, lora: bool) -> None:
    measured = iter([0.5, 0.5, 0.3])  # before, right after, after recovery
    callback = PredictExtendCallback(
        predictor, evaluate=lambda model: next(measured), guards={"recovery": 3}, **SMALL | {"settle": 3}
    )
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}

    def look(when: str) -> Watch:
        def note(step: int, model: Any) -> None:
            moments = [state["exp_avg"].clone() for state in trainer.optimizer.state.values()]
            seen[when, step] = [logits(model), *moments]

        return Watch(note)

    trainer = make_trainer([look("before"), callback, look("after")], steps=9, lora=lora)
    trainer.train()
    (jump,) = callback.journal.jumps()
    assert not jump["accepted"]
    assert all(torch.equal(a, b) for a, b in zip(seen["before", 6], seen["after", 9], strict=True))


def test_a_jump_is_made_at_a_generation_boundary_and_refused_inside_one_before_training(make_trainer: Any) -> None:
    reuse = {"num_iterations": 2, "steps_per_generation": 2}  # one generation serves four steps
    with raises_kind("config-schedule", "step 6", "multiples of 4"):
        make_trainer([jumping(FACTORS)], steps=12, **reuse).train()
    fits = {"observe": 4, "every": 4, "horizon": 4, "settle": 4}
    with raises_kind("config-schedule", "guards.recovery multiples of 4"):
        make_trainer([PredictExtendCallback(FACTORS, guards={"recovery": 3}, **fits)], steps=12, **reuse).train()
    callback = PredictExtendCallback(FACTORS | {"window": 4}, observe=8, every=4, horizon=4, settle=2)
    saving = {"save_strategy": "steps", "save_steps": 6}
    make_trainer([callback], steps=12, **reuse, **saving).train()
    assert [jump["step"] for jump in callback.journal.jumps() if jump["accepted"]] == [8]
    # Resumed inside a generation, TRL generates anew at that step, and then after every fourth.
    resumed = make_trainer([callback], steps=12, **reuse)
    free = dict[int, bool]()
    resumed.add_callback(Watch(lambda step, model: free.update({step: callback.backend.takes_weights(step)})))
    resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-6"))
    assert [step for step, whole in free.items() if whole] == [10]
    (jump,) = callback.journal.jumps()
    assert not jump["accepted"]
    assert "roll-outs" in jump["reason"]


def test_a_run_with_a_reference_adapter_takes_factor_jumps(make_trainer: Any) -> None:
    callback = jumping(FACTORS)
    make_trainer([callback], steps=8, lora=False, model=adapted(), beta=0.05).train()
    assert [jump["accepted"] for jump in callback.journal.jumps()] == [True]


TOKENS = {"trainable_token_indices": [1, 2]}
MODULES = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}


@pytest.mark.parametrize(("predictor", "lora"), [(FACTORS, TOKENS), (MERGED, MODULES)])
def test_jumps_with_other_modules_are_saved(
    make_trainer: Any, tmp_path: Path, predictor: Any, lora: dict[str, Any]
) -> None:
    callback = jumping(predictor, guards={"max_norm_ratio": None})
    make_trainer([callback], steps=8, lora=lora, save_strategy="steps", save_steps=8).train()
    assert [jump["accepted"] for jump in callback.journal.jumps()] == [True]
    assert (tmp_path / "trainer/checkpoint-8/adapter_model.safetensors").is_file()


def test_jumps_that_every_later_save_would_fail_at_are_refused_before_training(make_trainer: Any) -> None:
    from peft import PromptTuningConfig

    trainer = make_trainer([jumping(MERGED)], lora=TOKENS)
    with raises_kind("backend-unsupported", "trainable_tokens", "space: factors"):
        trainer.train()
    assert trainer.state.global_step == 0
    model = adapted(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with raises_kind("backend-unsupported", "PROMPT_TUNING", "auto"):
        make_trainer([jumping()], lora=False, model=model).train()


def test_fused_experts_are_moved_in_their_factors(make_trainer: Any, tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4}
    lora = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, vocab_size=19, num_experts_per_tok=2))
    callback = jumping(FACTORS, guards={"max_norm_ratio": None})
    make_trainer([callback], steps=8, lora=lora, model=model).train()
    assert [jump["accepted"] for jump in callback.journal.jumps()] == [True]
    source = open_checkpoints(tmp_path / "trainer/next-core/checkpoints")
    assert len(source.parameters) == 1 + 2 * 4


@pytest.mark.parametrize(
    ("fields", "kind", "name"),
    [
        ({"observe": 7, "every": 3}, "config-contradiction", "observe (7)"),
        ({"obzerve": 6}, "config-unknown-key", "'observe'"),
        ({"predictor": {"name": "secant", "windw": 3}}, "config-unknown-key", "'window'"),
        ({"guards": {"recovery": 3}}, "config-schedule", "guards.recovery (3)"),
        ({"rank": 0}, "config-invalid-value", "rank"),
    ],
)
def test_wrong_settings_are_named_when_the_callback_is_made(fields: dict[str, Any], kind: str, name: str) -> None:
    with raises_kind(kind, name):
        PredictExtendCallback(**{"predictor": "secant", **fields})


@pytest.mark.parametrize(("predictor", "field"), [(MERGED, "load_best_model_at_end"), ("auto", "sync_ref_model")])
def test_what_a_trainer_would_not_undo_is_refused(make_trainer: Any, predictor: Any, field: str) -> None:
    trainer = make_trainer([PredictExtendCallback(predictor, **SMALL if predictor is MERGED else {})])
    setattr(trainer.args, field, True)
    with raises_kind("config-contradiction", field):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_second_callback_in_one_trainer_is_refused(make_trainer: Any) -> None:
    with raises_kind("config-contradiction", "remove_callback"):
        make_trainer([PredictExtendCallback("auto"), PredictExtendCallback("auto")]).train()


def test_a_full_parameter_run_in_bf16_is_refused(make_trainer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    with raises_kind("backend-unsupported", "float32"):
        make_trainer([jumping(MERGED)], steps=8, lora=False, model=model).train()


def test_what_is_logged_before_training_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jumping(FACTORS).on_log(None, TrainerState(), None, logs={"eval_reward": 1.0})
    assert not [*tmp_path.iterdir()]

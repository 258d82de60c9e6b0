"""``evaluate="reward"``, and the best model that a trainer loads at its end."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

from next_backends.trl import PredictExtendCallback
from next_backends.trl.evaluate import greedy_accuracy
from tests.backends.trl.conftest import FACTORS, PROMPTS, exact, jumping
from tests.errors import raises_kind

pytestmark = pytest.mark.trl
EVALUATED = [{"prompt": prompt, "answer": str(eval(prompt[:-1]))} for prompt in PROMPTS]


def test_the_probe_is_the_reward_of_greedy_completions_of_held_back_prompts(make_trainer: Any, tokenizer: Any) -> None:
    callback = jumping(FACTORS, evaluate="reward", average=6)
    trainer = make_trainer([callback], steps=12)
    held = [(row["prompt"], row["answer"]) for row in callback._prompts]
    assert (len(held), len(trainer.train_dataset)) == (60, 540)
    assert not {prompt for prompt, _ in held} & set(trainer.train_dataset["prompt"])
    assert len({prompt[:2] for prompt, _ in held}) == 30  # from all over the data, which are sorted
    trainer.train()

    found = callback.backend.evaluate()
    model, right = trainer.model.eval(), 0.0
    for prompt, answer in held:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, do_sample=False, max_new_tokens=4, pad_token_id=tokenizer.pad_token_id)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        right += exact([text], [answer])[0]
    assert found == pytest.approx(right / len(held))
    assert 0 < right < len(held)
    (average,) = (record for record in callback.journal.records if record["event"] == "average")
    assert average["tried"].keys() == {"6"}
    assert all(jump["accuracy_before"] is not None for jump in callback.journal.jumps())


class Asked(torch.nn.Linear):
    """A model that completes nothing, and the tokens that it was given."""

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        self.ids = input_ids.tolist()
        return input_ids


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_begins_with_the_token_that_starts_it_once_as_in_training(tokenizer: Any, chat: bool) -> None:
    tokenizer, model = copy.deepcopy(tokenizer), Asked(1, 1)
    begin, number = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer.chat_template = begin + "{{ messages[0].content }}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{begin} $A", special_tokens=[(begin, number)])
    prompt = [{"role": "user", "content": "1+2="}] if chat else "1+2="
    data = Dataset.from_list([{"prompt": prompt, "answer": "3"}])
    greedy_accuracy(model, tokenizer, data, lambda **_: [0.0], 4)
    assert model.ids == [[number, *tokenizer("1+2=", add_special_tokens=False)["input_ids"]]]


def test_an_eval_dataset_is_probed_and_the_run_stays_plain(make_trainer: Any, logits: Any, plain_logits: Any) -> None:
    callback = jumping("stay", evaluate="reward")
    trainer = make_trainer([callback], steps=8, eval_rows=EVALUATED)
    trainer.train()
    assert callback._prompts["prompt"] == PROMPTS
    assert callback.backend.evaluate() in (0, 0.25, 0.5, 0.75, 1)
    assert torch.equal(logits(trainer.model), plain_logits(8, True))


def test_a_trainer_whose_reward_cannot_be_reached_is_refused(make_trainer: Any) -> None:
    callback = jumping(FACTORS, evaluate="reward")
    trainer = make_trainer()
    trainer.add_callback(callback)
    with raises_kind("config-contradiction", "callbacks=[...]"):
        trainer.train()
    trainer = make_trainer([callback])
    trainer.reward_funcs = []
    with raises_kind("config-contradiction", "reward functions"):
        trainer.train()
    with raises_kind("config-invalid-value", "'accuracy'"):
        PredictExtendCallback(FACTORS, evaluate="accuracy")


@pytest.mark.parametrize("best", [8, 12])
def test_the_best_model_at_the_end_may_be_the_mean_or_an_earlier_one_and_the_journal_says_which(
    make_trainer: Any, tmp_path: Path, best: int, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = jumping(FACTORS, evaluate=lambda model: next(measured), average=6)
    measured = iter([0.1, 0.2, 0.3, 0.4])
    trainer = make_trainer(
        [callback], steps=12, eval_rows=EVALUATED, load_best_model_at_end=True, metric_for_best_model="wanted",
        eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4, num_generations_eval=1,
    )  # fmt: skip
    evaluate = trainer.evaluate

    def evaluated(*args: Any, **fields: Any) -> dict[str, float]:
        return {**evaluate(*args, **fields), "eval_wanted": float(trainer.state.global_step == best)}

    trainer.evaluate = evaluated
    trainer.train()
    saved = load_file(tmp_path / "trainer" / f"checkpoint-{best}" / "adapter_model.safetensors")
    live = {name: value for name, value in trainer.model.state_dict().items() if "lora" in name}
    for name, value in saved.items():
        assert torch.equal(live[name.replace(".weight", ".default.weight")], value)
    assert [record["accepted"] for record in callback.journal.records if record["event"] == "average"] == [True]
    said = [record for record in callback.journal.records if record["event"] == "best"]
    assert [record["loaded"] for record in said] == [best]
    assert f"step {best}" in next(line for line in capsys.readouterr().out.splitlines() if "load_best_model" in line)

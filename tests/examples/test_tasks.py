"""Every example task is what examples/README.md says: right answers, honest rewards, a base of that accuracy."""

import importlib
import importlib.util
import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the tasks' models are transformers ones: install next-core[trl]")

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from next_core.config import load_config
from next_core.rewards import make_reward
from next_core.run_config import Choice

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DATA_FILES = {"train": 8192, "validation": 512, "test": 1024}

# As examples/README.md records them, measured on test.jsonl: sampled, greedy.
RECORDED = {"arithmetic": (0.214, 0.700), "sorting": (0.147, 0.608), "editing": (0.192, 0.567)}
ARCHITECTURES = {"arithmetic": "qwen2", "sorting": "qwen2", "editing": "llama"}


@pytest.fixture(scope="module", autouse=True)
def examples_on_path() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


@pytest.fixture(params=RECORDED)
def task(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(f"{request.param}.make_base").TASK


@pytest.fixture(scope="module")
def kit(examples_on_path: None) -> ModuleType:
    return importlib.import_module("task_kit")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_tasks", ROOT / "benchmarks" / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str, split: str) -> list[dict[str, str]]:
    lines = (EXAMPLES / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def columns(rows: list[dict[str, str]]) -> tuple[list[str], list[str]]:
    return [row["prompt"] for row in rows], [row["answer"] for row in rows]


def test_data_files_are_what_the_generator_makes(task: Any, kit: ModuleType, tmp_path: Path) -> None:
    for split, problems in kit.split_problems(task).items():
        assert len(problems) == DATA_FILES[split]
        kit.write_problems(tmp_path / split, problems)
        assert (tmp_path / split).read_bytes() == (EXAMPLES / task.name / f"{split}.jsonl").read_bytes()


def test_slips_are_wrong_and_drawn_from_the_tasks_characters(task: Any, kit: ModuleType) -> None:
    rng = random.Random(0)
    for problem in kit.split_problems(task)["train"][:2000]:
        slip = task.wrong_answer(problem, rng)
        assert slip != problem.answer
        assert task.name != "arithmetic" or slip == str(int(slip))  # neither negative nor padded
        assert set(slip) <= set(task.characters)


def test_shipped_base_has_the_recorded_accuracy(task: Any, kit: ModuleType) -> None:
    base = EXAMPLES / task.name / "base"
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.config.model_type == ARCHITECTURES[task.name]
    accuracy = kit.evaluate(model, AutoTokenizer.from_pretrained(base), *columns(read(task.name, "test")))
    sampled, greedy = RECORDED[task.name]
    assert accuracy.sampled == pytest.approx(sampled, abs=0.005)
    assert accuracy.greedy == pytest.approx(greedy, abs=0.005)
    assert f"{sampled:.3f}, {greedy:.3f} |".replace("0.", ".") in (EXAMPLES / "README.md").read_text()


def test_exact_accuracy_is_that_of_generation_and_reward(task: Any, kit: ModuleType, benchmark: ModuleType) -> None:
    """Teacher forcing must agree with the model's own ``generate``, run with the settings shipped beside it.

    A task's own reward that paid for more than the answer with its end would show as well.
    """
    base, settings = EXAMPLES / task.name / "base", benchmark.TASKS[task.name]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    prompts, answers = columns(read(task.name, "validation")[:128])
    exact = kit.evaluate(model, tokenizer, prompts, answers)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    own = settings["reward"] != "math-verify"
    reward = make_reward(Choice(name=settings["reward"])) if own else None

    def shares(copies: int, **how: object) -> list[float]:
        """Of right answers that are ended, and of the reward."""
        limit = settings["max_new_tokens"]
        written = model.generate(**inputs, max_new_tokens=limit, num_return_sequences=copies, **how)
        ids = written[:, inputs["input_ids"].shape[1] :]
        asked, wanted = ([row for row in rows for _ in range(copies)] for rows in (prompts, answers))
        # The end token is part of the answer: the limit leaves room for it.
        right = [t.startswith(a + kit.EOS) for t, a in zip(tokenizer.batch_decode(ids), wanted, strict=True)]
        found = [sum(right) / len(right)]
        if reward is not None:
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            found.append(sum(reward(prompts=asked, completions=texts, answer=wanted)) / len(texts))
        return found

    torch.manual_seed(0)
    copies = 8
    noise = (0.25 / (len(prompts) * copies)) ** 0.5
    assert all(share == pytest.approx(exact.sampled, abs=4 * noise) for share in shares(copies))
    assert all(share == pytest.approx(exact.greedy, abs=0.005) for share in shares(1, do_sample=False))


def test_tokenizer_survives_the_class_that_transformers_picks(task: Any) -> None:
    """AutoTokenizer may read a folder as another class than the one that wrote it."""
    base = EXAMPLES / task.name / "base"
    written, automatic = PreTrainedTokenizerFast.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert (automatic.pad_token_id, automatic.bos_token_id, automatic.eos_token_id) == (0, 1, 2)
    assert automatic.padding_side == "left"
    for split in DATA_FILES:
        texts = [row["prompt"] + row["answer"] for row in read(task.name, split)]
        ids = automatic(texts)["input_ids"]
        assert ids == written(texts)["input_ids"]
        assert [len(row) for row in ids] == [len(text) for text in texts]
        ended = [[*row, automatic.eos_token_id] for row in ids]
        assert automatic.batch_decode(ended, skip_special_tokens=True) == texts


def test_the_script_makes_the_shipped_files(task: Any, kit: ModuleType, tmp_path: Path) -> None:
    """In a few steps, which is all the same to every file but the weights."""
    kit.make(replace(task, recipe=kit.Recipe(clean_steps=1, noisy_steps=1)), tmp_path / "base", tmp_path, seed=0)
    shipped = EXAMPLES / task.name / "base"
    assert {file.name for file in shipped.iterdir()} == {file.name for file in (tmp_path / "base").iterdir()}
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        made, kept = (json.loads((folder / file).read_text()) for folder in (tmp_path / "base", shipped))
        for settings in (made, kept):
            settings.pop("transformers_version", None)
        assert made == kept
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "base", shipped)]
    assert sizes[0] == sizes[1]


@pytest.mark.base_model
def test_the_script_still_makes_such_a_base(kit: ModuleType, tmp_path: Path) -> None:
    """Same data to the byte; weights may drift with the machine's arithmetic, so accuracy gets some room.

    Of the tasks only arithmetic is made again in full: the kit that trains is the same for all.
    """
    folder = EXAMPLES / "arithmetic"
    subprocess.run([sys.executable, folder / "make_base.py", "--out", tmp_path / "base"], check=True)
    for split in DATA_FILES:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (folder / f"{split}.jsonl").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    accuracy = kit.evaluate(model, tokenizer, *columns(read("arithmetic", "test")))
    sampled, greedy = RECORDED["arithmetic"]
    assert accuracy.sampled == pytest.approx(sampled, abs=0.04)
    assert accuracy.greedy == pytest.approx(greedy, abs=0.08)


@pytest.mark.parametrize("split", DATA_FILES)
def test_sums_of_two_digit_numbers_are_right(split: str) -> None:
    for row in read("arithmetic", split):
        a, sign, b = re.fullmatch(r"([1-9]\d)([+-])([1-9]\d)=", row["prompt"]).groups()
        right = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert right >= 0
        assert row["answer"] == str(right)


@pytest.mark.parametrize("split", DATA_FILES)
def test_sorted_digits_are_in_order_and_the_same_digits(split: str) -> None:
    for row in read("sorting", split):
        digits, answer = row["prompt"].removesuffix("="), row["answer"]
        assert len(digits) == 6
        assert digits.isdigit()
        assert all(a <= b for a, b in itertools.pairwise(answer))
        assert Counter(answer) == Counter(digits)
        assert answer != digits  # so that a copy of the prompt is never right


@pytest.mark.parametrize("split", DATA_FILES)
def test_edited_words_are_what_a_list_worked_on_in_place_gives(split: str) -> None:
    for row in read("editing", split):
        word, program = row["prompt"].removesuffix("=").split(":")
        assert len(set(word)) == 4
        assert len(program) == 3
        letters = list(word)
        for command in program:
            if command == "R":
                letters.reverse()
            elif command == "L":
                letters.append(letters.pop(0))
            else:
                assert command == "S"
                letters[0], letters[1] = letters[1], letters[0]
        assert row["answer"] == "".join(letters)


CHEATS = (
    "",
    "{prompt}",
    "{answer}=",
    "={answer}",
    " {answer}",
    "{answer} ",
    "{answer}{answer}",
    "{answer}\n",
    "answer",
)


@pytest.mark.parametrize("name", ["sorting", "editing"])
def test_the_reward_pays_for_the_answer_and_for_nothing_else(name: str) -> None:
    reward = importlib.import_module(f"{name}.reward").reward
    for row in read(name, "validation"):
        right = row["answer"]
        tries = [cheat.format(**row) for cheat in CHEATS]
        tries += [right[:-1], right + right[-1], right[::-1], row["prompt"][:-1], row["prompt"].split(":")[0]]
        wrong = [text for text in tries if text != right]
        assert reward([row["prompt"]] * len(wrong), wrong, answer=[right] * len(wrong)) == [0.0] * len(wrong)
        # Worked out from the prompt: a wrong `answer` column would not be paid for.
        assert reward(prompts=[row["prompt"]], completions=[right], answer=["?"]) == [1.0]


@pytest.mark.parametrize("name", ["sorting", "editing"])
def test_the_config_is_the_benchmarks_and_leaves_room_for_the_answer(name: str, benchmark: ModuleType) -> None:
    training = load_config(EXAMPLES / f"{name}.yaml").training
    assert {"reward": training.reward.name, "max_new_tokens": training.max_new_tokens} == benchmark.TASKS[name]
    assert training.evaluation == "likelihood"
    longest = max(len(row["answer"]) for split in DATA_FILES for row in read(name, split))
    assert training.max_new_tokens == longest + 1  # with less, an answer without its end would be paid for


def test_the_page_shows_the_committed_results(benchmark: ModuleType) -> None:
    stored = json.loads(benchmark.RESULTS.read_text())
    assert not list(benchmark.missing(stored["rows"]))
    page = ROOT / "docs" / "benchmarks" / "tasks.md"
    assert benchmark.table(stored) in page.read_text()
    for name, base in stored["bases"].items():
        assert (round(base["sampled"], 3), round(base["greedy"], 3)) == RECORDED[name]

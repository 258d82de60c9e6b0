"""The arithmetic example is what its README says, and its script still makes it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers", reason="the example's model is a transformers one: install next-core[trl]")

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

TASK = Path(__file__).parents[2] / "examples" / "arithmetic"
BASE = TASK / "base"
DATA_FILES = {"train": 8192, "validation": 512, "test": 1024}

# As README.md records them, measured on test.jsonl.
SAMPLED, GREEDY = 0.214, 0.700


@pytest.fixture(scope="module")
def make_base() -> ModuleType:
    spec = importlib.util.spec_from_file_location("arithmetic_make_base", TASK / "make_base.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def read(name: str, folder: Path = TASK) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def columns(rows: list[dict[str, str]]) -> tuple[list[str], list[str]]:
    return [row["prompt"] for row in rows], [row["answer"] for row in rows]


def test_shipped_base_has_the_recorded_accuracy(make_base: ModuleType) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    accuracy = make_base.evaluate(model, AutoTokenizer.from_pretrained(BASE), *columns(read("test")))
    assert accuracy.sampled == pytest.approx(SAMPLED, abs=0.005)
    assert accuracy.greedy == pytest.approx(GREEDY, abs=0.005)


def test_exact_accuracy_is_what_generation_gives(make_base: ModuleType) -> None:
    """Teacher forcing must agree with the model's own ``generate``, run with the settings shipped beside it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    prompts, answers = columns(read("validation"))
    exact = make_base.evaluate(model, tokenizer, prompts, answers)
    inputs = tokenizer(prompts, return_tensors="pt")

    def share_right(copies: int, **settings: object) -> float:
        written = model.generate(**inputs, max_new_tokens=4, num_return_sequences=copies, **settings)
        # The end token is part of the answer: 4 tokens hold the longest answer and its end.
        texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :])
        wanted = [answer + make_base.EOS for answer in answers for _ in range(copies)]
        return sum(t.startswith(w) for t, w in zip(texts, wanted, strict=True)) / len(wanted)

    torch.manual_seed(0)
    copies = 16
    noise = (0.25 / (len(prompts) * copies)) ** 0.5
    assert share_right(copies) == pytest.approx(exact.sampled, abs=4 * noise)
    assert share_right(1, do_sample=False) == pytest.approx(exact.greedy, abs=0.005)


def test_base_is_small_and_names_no_path_of_the_machine_that_made_it() -> None:
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 1_300_000
    assert {file.name for file in BASE.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for file in BASE.glob("*config.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        assert not [key for key, value in settings.items() if isinstance(value, str) and "/" in value]
        assert "_name_or_path" not in settings


def test_data_files_share_no_prompt() -> None:
    prompts = {name: {row["prompt"] for row in read(name)} for name in DATA_FILES}
    assert {name: len(part) for name, part in prompts.items()} == DATA_FILES
    assert len(set.union(*prompts.values())) == sum(DATA_FILES.values())


@pytest.mark.parametrize("name", DATA_FILES)
def test_every_answer_is_right_and_every_operand_has_two_digits(name: str) -> None:
    rows = read(name)
    assert len(rows) == DATA_FILES[name]
    for row in rows:
        assert set(row) == {"prompt", "answer"}
        prompt = row["prompt"]
        a, sign, b, end = int(prompt[:2]), prompt[2], int(prompt[3:5]), prompt[5:]
        assert end == "="
        assert sign in {"+", "-"}
        assert 10 <= a <= 99
        assert 10 <= b <= 99
        right = a + b if sign == "+" else a - b
        assert right >= 0
        assert row["answer"] == str(right)


def test_tokenizer_survives_the_class_that_transformers_picks() -> None:
    """AutoTokenizer reads a qwen2 folder as another class than the one that wrote it."""
    written, automatic = PreTrainedTokenizerFast.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    assert (automatic.pad_token_id, automatic.bos_token_id, automatic.eos_token_id) == (0, 1, 2)
    assert automatic.padding_side == "left"
    for name in DATA_FILES:
        texts = [row["prompt"] + row["answer"] for row in read(name)]
        ids = automatic(texts)["input_ids"]
        assert ids == written(texts)["input_ids"]
        assert [len(row) for row in ids] == [len(text) for text in texts]
        ended = [[*row, automatic.eos_token_id] for row in ids]
        assert automatic.batch_decode(ended, skip_special_tokens=True) == texts


def test_script_refuses_a_tokenizer_that_autotokenizer_reads_otherwise(
    make_base: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typographic minus is several tokens of the byte-level class, none of them in this vocabulary."""
    minus = chr(0x2212)
    vocabulary = tuple(minus if token == "-" else token for token in make_base.VOCABULARY)
    monkeypatch.setattr(make_base, "VOCABULARY", vocabulary)
    make_base.make_tokenizer().save_pretrained(tmp_path)
    make_base.make_model().config.save_pretrained(tmp_path)
    make_base.check_tokenizer(tmp_path, [make_base.Problem(37, "+", 25)])
    with pytest.raises(ValueError, match=r"Qwen2Tokenizer reads .* one ASCII character"):
        make_base.check_tokenizer(tmp_path, [make_base.Problem(37, minus, 25)])


def test_wrong_answers_are_wrong_and_written_in_plain_digits(make_base: ModuleType) -> None:
    rng = make_base.random.Random(0)
    for problem in make_base.split_problems()["train"][:2000]:
        wrong = make_base.wrong_answer(problem, rng)
        assert wrong.isdigit()
        assert wrong == str(int(wrong))
        assert wrong != problem.answer


@pytest.mark.base_model
def test_script_still_makes_such_a_base(make_base: ModuleType, tmp_path: Path) -> None:
    """Same data to the byte; weights may drift with the machine's arithmetic, so accuracy gets some room."""
    subprocess.run([sys.executable, TASK / "make_base.py", "--out", tmp_path / "base"], check=True)
    for name in DATA_FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (TASK / f"{name}.jsonl").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    accuracy = make_base.evaluate(model, tokenizer, *columns(read("test")))
    assert accuracy.sampled == pytest.approx(SAMPLED, abs=0.04)
    assert accuracy.greedy == pytest.approx(GREEDY, abs=0.08)

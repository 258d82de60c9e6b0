"""Makes the arithmetic task from nothing: data, character tokenizer, and a small base model for RL.

The base is first taught right answers, then a little on demonstrations most of which are wrong. What results
knows the sums but spreads its probability over the usual slips: its greedy answer is far more often right than a
sampled one, and that gap is what RL with a verifiable reward closes, smoothly and in a few hundred cheap steps.
Stopping the clean training early can give a base of the same accuracy, but one that lacks the skill instead of
hiding it, and RL on it stalls.

Needs torch, transformers and tokenizers only; takes about a minute on one core::

    python examples/arithmetic/make_base.py
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

# Every base is made from, and measured on, the same files: only the weights depend on --seed.
DATA_SEED = 20_24
TRAIN, VALIDATION, TEST = 8192, 512, 1024

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
# `*` and `/` are not used: they leave room for a harder task on the same vocabulary.
VOCABULARY = (PAD, BOS, EOS, UNK, *"0123456789+-=*/")
IGNORED = -100

BATCH = 128
# Matrices start at this standard deviation: from the usual 0.02, 1000 steps are too few to learn the sums.
INITIAL_STD = 0.04
CLEAN_LR = 2e-3
# So large that the wrong demonstrations also hurt the greedy answers: at 1e-3 these stay 86% right.
NOISY_LR = 2.5e-3
WRONG_SHARE = 0.65


@dataclass(frozen=True)
class Problem:
    """``a + b`` or ``a - b`` with two-digit operands and an answer that is not negative."""

    a: int
    sign: str
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}{self.sign}{self.b}="

    @property
    def answer(self) -> str:
        return str(self.a + self.b if self.sign == "+" else self.a - self.b)


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over a set of prompts: ``sampled`` at temperature 1, and ``greedy``; both in 0..1."""

    sampled: float
    greedy: float

    def __str__(self) -> str:
        return f"sampled {self.sampled:.3f}, greedy {self.greedy:.3f}"


def split_problems() -> dict[str, list[Problem]]:
    """Disjoint ``train``, ``validation`` and ``test`` problems: one shuffle of all 12,195, cut in three.

    What the shuffle leaves over is dropped, which keeps the training file small.
    """
    operands = range(10, 100)
    problems = [Problem(a, "+", b) for a in operands for b in operands]
    problems += [Problem(a, "-", b) for a in operands for b in operands if a >= b]
    random.Random(DATA_SEED).shuffle(problems)
    held_out = TEST + VALIDATION
    return {
        "train": problems[held_out : held_out + TRAIN],
        "validation": problems[TEST:held_out],
        "test": problems[:TEST],
    }


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """One JSON object a line, with ``prompt`` and ``answer``."""
    lines = (json.dumps({"prompt": problem.prompt, "answer": problem.answer}) for problem in problems)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")


def wrong_answer(problem: Problem, rng: random.Random) -> str:
    """A slip somebody could make: one or ten off, a carry forgotten, or the other operation done.

    The kind is drawn first; a kind that gives the right answer or a negative one is drawn again.
    """
    a, b, right = problem.a, problem.b, int(problem.answer)
    while True:
        match rng.choice(("one off", "ten off", "no carry", "other operation")):
            case "one off":
                slip = right + rng.choice((-1, 1))
            case "ten off":
                slip = right + rng.choice((-10, 10))
            case "no carry":
                step = 1 if problem.sign == "+" else -1
                slip = (a // 10 + step * (b // 10)) % 10 * 10 + (a + step * b) % 10
            case _:
                slip = abs(a - b) if problem.sign == "+" else a + b
        if slip >= 0 and slip != right:
            return str(slip)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; no token is added to a prompt."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def check_tokenizer(folder: Path, problems: Sequence[Problem]) -> None:
    """Raise ValueError unless AutoTokenizer reads ``folder`` as the class that wrote it does.

    transformers picks the tokenizer's class by the model's type and loads any Qwen2 folder as Qwen2Tokenizer,
    here a byte-level BPE without merges. That drops, without a word, every plain token that is not one ASCII
    character.
    """
    written = PreTrainedTokenizerFast.from_pretrained(folder)
    automatic = AutoTokenizer.from_pretrained(folder)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(written, name) != getattr(automatic, name):
            raise ValueError(f"{folder}: AutoTokenizer ({type(automatic).__name__}) has another {name}")
    for problem in problems:
        text = problem.prompt + problem.answer
        ids = [VOCABULARY.index(character) for character in text]
        for tokenizer in (written, automatic):
            read = tokenizer(text)["input_ids"]
            shown = tokenizer.decode([*ids, VOCABULARY.index(EOS)], skip_special_tokens=True)
            if read != ids or shown != text:
                raise ValueError(
                    f"{folder}: {type(tokenizer).__name__} reads {text!r} as {read}, not {ids}, and shows those as"
                    f" {shown!r}; keep every plain token to one ASCII character"
                )


def make_model() -> Qwen2ForCausalLM:
    """A Qwen2 of 301k parameters in float32, its ids set so that generation needs no further settings."""
    ids = {
        "pad_token_id": VOCABULARY.index(PAD),
        "bos_token_id": VOCABULARY.index(BOS),
        "eos_token_id": VOCABULARY.index(EOS),
    }
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=INITIAL_STD,
        tie_word_embeddings=False,
        dtype="float32",
        **ids,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    return model


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both (rows, longest row), padded on the right.

    The labels hold the answer and the end token; prompt and padding are IGNORED.
    """
    rows, starts = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        starts.append(len(ids))
        rows.append(ids + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id])
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    labels = torch.full_like(input_ids, IGNORED)
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        labels[index, start : len(row)] = input_ids[index, start : len(row)]
    return input_ids, labels


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    batch: int = 256,
) -> Accuracy:
    """Exact accuracy by teacher forcing: no sampling, hence no noise.

    Sampled is the mean probability, at temperature 1, of writing the answer and then the end token; greedy is
    the share of prompts for which each of those tokens is the most probable one.
    """
    model.eval()
    sampled, greedy = 0.0, 0
    for first in range(0, len(prompts), batch):
        chunk = slice(first, first + batch)
        input_ids, labels = encode(tokenizer, prompts[chunk], answers[chunk])
        logits, targets = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float(), labels[:, 1:]
        # Rows are padded on the right and attention looks left, so no attention mask is needed.
        log_probability = -functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
        )
        sampled += log_probability.sum(dim=1).exp().sum().item()
        greedy += int(((logits.argmax(-1) == targets) | (targets == IGNORED)).all(dim=1).sum())
    return Accuracy(sampled / len(prompts), greedy / len(prompts))


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    steps: int,
    lr: float,
    wrong_share: float,
    rng: random.Random,
) -> None:
    """Supervised AdamW steps on answer and end token, learning rate falling linearly to nothing.

    ``wrong_share`` of the demonstrations, drawn afresh each step, carry a wrong answer.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(steps):
        drawn = rng.choices(problems, k=BATCH)
        answers = [wrong_answer(p, rng) if rng.random() < wrong_share else p.answer for p in drawn]
        input_ids, labels = encode(tokenizer, [problem.prompt for problem in drawn], answers)
        logits = model(input_ids=input_ids, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()


def make(out: Path, data_out: Path, *, seed: int, clean_steps: int, noisy_steps: int) -> Accuracy:
    """Write the data files and the base model, and return the base's accuracy on the test prompts."""
    problems = split_problems()
    data_out.mkdir(parents=True, exist_ok=True)
    for name, part in problems.items():
        write_problems(data_out / f"{name}.jsonl", part)

    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer, model = make_tokenizer(), make_model()
    tokenizer.save_pretrained(out)
    model.config.save_pretrained(out)  # AutoTokenizer looks at the model's type
    check_tokenizer(out, problems["test"])

    def report(stage: str) -> Accuracy:
        test = problems["test"]
        accuracy = evaluate(model, tokenizer, [p.prompt for p in test], [p.answer for p in test])
        print(f"{stage}: {accuracy} on {len(test)} test prompts ({time.process_time():.0f} s of CPU time)")
        return accuracy

    known = problems["train"]
    train(model, tokenizer, known, steps=clean_steps, lr=CLEAN_LR, wrong_share=0.0, rng=rng)
    report("after right answers")
    train(model, tokenizer, known, steps=noisy_steps, lr=NOISY_LR, wrong_share=WRONG_SHARE, rng=rng)
    accuracy = report(f"after {WRONG_SHARE:.0%} wrong answers")
    model.save_pretrained(out)
    return accuracy


def main(arguments: Sequence[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Make the arithmetic task: data files and base model.")
    parser.add_argument("--out", type=Path, default=here / "base", help="folder for the model (default: %(default)s)")
    parser.add_argument("--data-out", type=Path, help="folder for the data files (default: the one holding --out)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights; the data never change")
    parser.add_argument("--clean-steps", type=int, default=1000, help="steps on right answers")
    parser.add_argument("--noisy-steps", type=int, default=120, help="steps on mostly wrong answers")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; a model this small gains from no more")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    make(
        options.out,
        options.data_out or options.out.resolve().parent,
        seed=options.seed,
        clean_steps=options.clean_steps,
        noisy_steps=options.noisy_steps,
    )


if __name__ == "__main__":
    main()

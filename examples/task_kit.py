"""What the example tasks share: data files, a character tokenizer, and how a small base model for RL is made.

A base is first taught right answers, then a little on demonstrations most of which are wrong. What results knows the
task but spreads its probability over the usual slips: its greedy answer is far more often right than a sampled one,
and that gap is what RL with a verifiable reward closes, smoothly and in a few hundred cheap steps. Stopping the clean
training early can give a base of the same accuracy, but one that lacks the skill instead of hiding it, and RL on it
stalls.

A task is one file, ``<task>/make_base.py``: its problems, the slips, and a `Recipe`. Needs torch, transformers and
tokenizers only.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

# Every base is made from, and measured on, the same files: only the weights depend on --seed.
DATA_SEED = 20_24
TRAIN, VALIDATION, TEST = 8192, 512, 1024

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
IGNORED = -100

BATCH = 128
# Matrices start at this standard deviation: from the usual 0.02, 1000 steps are too few to learn the sums.
INITIAL_STD = 0.04


class Problem(Protocol):
    """A question with exactly one right answer string."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str: ...


@dataclass(frozen=True)
class Recipe:
    """How the base is trained: ``clean_steps`` on right answers, then ``noisy_steps`` on mostly wrong ones."""

    clean_steps: int
    noisy_steps: int
    clean_lr: float = 2e-3
    noisy_lr: float = 2.5e-3
    wrong_share: float = 0.65


@dataclass(frozen=True)
class Task:
    """What one example defines.

    ``characters`` are the plain tokens, ``problems()`` gives distinct problems, at least as many as the three files
    hold, and ``wrong_answer`` a slip somebody could make.
    """

    name: str
    characters: str
    problems: Callable[[], Sequence[Any]]
    wrong_answer: Callable[[Any, random.Random], str]
    recipe: Recipe
    architecture: type[PreTrainedConfig] = Qwen2Config
    tied: bool = False
    """Whether the head is the embedding."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (PAD, BOS, EOS, UNK, *self.characters)


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over a set of prompts: ``sampled`` at temperature 1, and ``greedy``; both in 0..1."""

    sampled: float
    greedy: float

    def __str__(self) -> str:
        return f"sampled {self.sampled:.3f}, greedy {self.greedy:.3f}"


def split_problems(task: Task) -> dict[str, list[Any]]:
    """Disjoint ``train``, ``validation`` and ``test`` problems: one shuffle of all, cut in three.

    What the shuffle leaves over is dropped, which keeps the training file small.
    """
    problems = list(task.problems())
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


def make_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a character; no token is added to a prompt."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNK))
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


def check_tokenizer(folder: Path, vocabulary: Sequence[str], problems: Sequence[Problem]) -> None:
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
        ids = [vocabulary.index(character) for character in text]
        for tokenizer in (written, automatic):
            read = tokenizer(text)["input_ids"]
            shown = tokenizer.decode([*ids, vocabulary.index(EOS)], skip_special_tokens=True)
            if read != ids or shown != text:
                raise ValueError(
                    f"{folder}: {type(tokenizer).__name__} reads {text!r} as {read}, not {ids}, and shows those as"
                    f" {shown!r}; keep every plain token to one ASCII character"
                )


def make_model(task: Task) -> PreTrainedModel:
    """A model of about 300k parameters in float32, its ids set so that generation needs no further settings."""
    ids = {f"{name}_token_id": task.vocabulary.index(f"<{name}>") for name in ("pad", "bos", "eos")}
    config = task.architecture(
        vocab_size=len(task.vocabulary),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=INITIAL_STD,
        tie_word_embeddings=task.tied,
        dtype="float32",
        **ids,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
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
    task: Task,
    problems: Sequence[Any],
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
        answers = [task.wrong_answer(p, rng) if rng.random() < wrong_share else p.answer for p in drawn]
        input_ids, labels = encode(tokenizer, [problem.prompt for problem in drawn], answers)
        logits = model(input_ids=input_ids, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()


def make(task: Task, out: Path, data_out: Path, *, seed: int) -> Accuracy:
    """Write the data files and the base model, and return the base's accuracy on the test prompts."""
    problems = split_problems(task)
    data_out.mkdir(parents=True, exist_ok=True)
    for name, part in problems.items():
        write_problems(data_out / f"{name}.jsonl", part)

    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer, model, recipe = make_tokenizer(task.vocabulary), make_model(task), task.recipe
    tokenizer.save_pretrained(out)
    model.config.save_pretrained(out)  # AutoTokenizer looks at the model's type
    check_tokenizer(out, task.vocabulary, problems["test"])

    def stage(name: str, steps: int, lr: float, wrong_share: float) -> Accuracy:
        train(model, tokenizer, task, problems["train"], steps=steps, lr=lr, wrong_share=wrong_share, rng=rng)
        test = problems["test"]
        accuracy = evaluate(model, tokenizer, [p.prompt for p in test], [p.answer for p in test])
        print(f"after {name}: {accuracy} on {len(test)} test prompts ({time.process_time():.0f} s of CPU time)")
        return accuracy

    stage("right answers", recipe.clean_steps, recipe.clean_lr, 0.0)
    name = f"{recipe.wrong_share:.0%} wrong answers"
    accuracy = stage(name, recipe.noisy_steps, recipe.noisy_lr, recipe.wrong_share)
    model.save_pretrained(out)
    return accuracy


def main(task: Task, here: Path, arguments: Sequence[str] | None = None) -> None:
    """The command line of a task that lies in the folder ``here``."""
    parser = argparse.ArgumentParser(description=f"Make the task '{task.name}': data files and base model.")
    parser.add_argument("--out", type=Path, default=here / "base", help="folder for the model (default: %(default)s)")
    parser.add_argument("--data-out", type=Path, help="folder for the data files (default: the one holding --out)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights; the data never change")
    parser.add_argument("--clean-steps", type=int, default=task.recipe.clean_steps, help="steps on right answers")
    parser.add_argument("--noisy-steps", type=int, default=task.recipe.noisy_steps, help="steps on mostly wrong ones")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; a model this small gains from no more")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = replace(task.recipe, clean_steps=options.clean_steps, noisy_steps=options.noisy_steps)
    data_out = options.data_out or options.out.resolve().parent
    make(replace(task, recipe=recipe), options.out, data_out, seed=options.seed)

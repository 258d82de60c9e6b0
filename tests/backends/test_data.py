"""Prompts from files: an error names the file and the row."""

import csv
from pathlib import Path

import pytest

from next_backends.data import is_chat, read_rows, read_splits
from next_core.run_config import TrainingSettings
from tests.errors import raises_kind

LINE = '{"prompt": "1+1=", "answer": "2", "level": 3}\n'


def training(evaluation: str = "likelihood", **data: Path) -> TrainingSettings:
    return TrainingSettings.model_validate({"model": Path("model"), "data": data, "evaluation": evaluation})


def file(folder: Path, text: str, name: str = "train.jsonl") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_lines_of_json_are_rows_with_all_their_columns(tmp_path: Path, name: str) -> None:
    rows = read_rows(file(tmp_path, LINE + "\n" + LINE.replace("1+1", "1\u2028ä"), name))
    assert [row["prompt"] for row in rows] == ["1+1=", "1\u2028ä="]  # a line ends in a newline alone
    assert rows[0]["level"] == 3


def test_a_csv_file_is_read_by_datasets(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as target:
        csv.writer(target).writerows([["prompt", "answer"], ["1+1=", "2"], ["a, b", "c"]])
    assert [row["prompt"] for row in read_rows(path)] == ["1+1=", "a, b"]


@pytest.mark.parametrize("name", ["train.txt", "train", "train.JSONL.gz"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with raises_kind("config-data", f"{name}: ", ".jsonl"):
        read_rows(file(tmp_path, LINE, name))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (LINE + '{"prompt": "1', ["JSONDecodeError"]),
        ("", ["no prompts"]),
        ("\n \n", ["no prompts"]),
        (LINE + '{"prompt": "1"}\n', ["row 2", "answer", "['prompt']"]),
        ('{"question": "1"}\n', ["row 1", "answer, prompt", "['question']"]),
        (LINE + '["1", "2"]\n', ["row 2", "prompt, answer"]),
        ("5\n", ["row 1"]),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, text: str, names: list[str]) -> None:
    with raises_kind("config-data", "train.jsonl", *names):
        read_rows(file(tmp_path, text))


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with raises_kind("config-data", "missing.jsonl", "FileNotFoundError"):
        read_rows(tmp_path / "missing.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\n")
    with raises_kind("config-data", "binary.jsonl", "UnicodeDecodeError"):
        read_rows(tmp_path / "binary.jsonl")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with raises_kind("config-data", "torn.parquet"):
        read_rows(tmp_path / "torn.parquet")


def test_a_split_that_is_not_given_is_the_other(tmp_path: Path) -> None:
    train = file(tmp_path, LINE)
    other = file(tmp_path, LINE.replace("1+1", "2+2"), "other.jsonl")
    assert read_splits(training(train=train)) == {}
    for split in ("validation", "test"):
        found = read_splits(training(train=train, **{split: other}))
        assert {name: rows[0]["prompt"] for name, rows in found.items()} == {"validation": "2+2=", "test": "2+2="}
    both = read_splits(training(train=train, validation=train, test=other))
    assert [both[split][0]["prompt"] for split in ("validation", "test")] == ["1+1=", "2+2="]


def test_the_likelihood_of_an_answer_is_not_measured_on_conversations(tmp_path: Path) -> None:
    chat = file(tmp_path, '{"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}\n')
    with raises_kind("config-contradiction", "prompts", "training.evaluation: generate"):
        read_splits(training(train=chat, test=chat))
    assert len(read_splits(training("generate", train=chat, test=chat))) == 2


def test_conversations_are_told_from_text_and_a_mixture_is_refused() -> None:
    assert not is_chat([{"prompt": "1+1=", "answer": "2"}])
    assert is_chat([{"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}])
    with raises_kind("config-data"):
        is_chat([{"prompt": "1+1="}, {"prompt": [{"role": "user", "content": "1+1="}]}])

"""Files made to do harm: each ends quickly in one message that names it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from next_core import open_checkpoints
from next_core.errors import CheckpointError, ConfigError
from next_core.storage.atomic import seal
from next_core.storage.json_lines import json_line
from next_core.storage.yaml_files import load_yaml, parse_yaml
from tests.conftest import Cli, LoraRun
from tests.errors import raises_kind
from tests.report.made import comparison, write_comparison
from tests.sources.models import adapter, edit_json, model

Damage = Callable[[Path], None]
CONFIG, WEIGHTS, STATE = "adapter_config.json", "adapter_model.safetensors", "trainer_state.json"


@pytest.fixture(autouse=True)
def bounded_time() -> Iterator[None]:
    """End the session if a reader blocks, as on a FIFO."""

    def late(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("it took more than a minute")  # which no reader catches

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def content(data: bytes | str) -> Damage:
    return lambda path: (path.write_bytes(data.encode() if isinstance(data, str) else data), None)[1]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_link_to(target: str) -> Damage:
    return lambda path: (path.unlink(), path.symlink_to(target))[1]


def as_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**43)


def pickled(path: Path) -> None:
    tensors = {key: value.clone() for key, value in load_file(path).items()}  # the file is mapped
    torch.save(tensors, path)


def changed(**fields: object) -> Damage:
    """An adapter's config with other fields; Python's json writes NaN and Infinity as they are."""
    return lambda path: edit_json(path, **fields)


TEXTS: dict[str, Damage] = {
    "empty": content(b""),
    "NUL bytes": content(b"\0" * 100),
    "no UTF-8": content(b'{"\xff": 1}'),
    "nested": content('{"a":' * 100_000),
    "a list": content("[]"),
    "truncated": truncated,
    "folder": as_folder,
    "fifo": as_fifo,
    "device": as_link_to("/dev/zero"),
    "loop": as_link_to_itself,
    "sparse": sparse,
}
DAMAGES: dict[str, tuple[str, Damage]] = {
    **{f"config: {name}": (CONFIG, damage) for name, damage in TEXTS.items()},
    "config: more than 4 MiB": (CONFIG, content("[" + "[]," * 1_400_000 + "[]]")),
    "config: digits": (CONFIG, content('{"peft_type": "LORA", "r": 2, "lora_alpha": 8' + "0" * 10_000 + "}")),
    "config: NaN": (CONFIG, changed(lora_alpha=float("nan"))),
    "config: Infinity": (CONFIG, changed(r=float("inf"))),
    "config: a text": (CONFIG, changed(lora_alpha="8")),
    "config: too many patterns": (CONFIG, changed(rank_pattern={f"x{i}": 4 for i in range(30_000)})),
    "config: an endless expression": (CONFIG, changed(rank_pattern={"(.+)+x": 4})),
    "config: another": (CONFIG, changed(rank_pattern={"(a|a|.)?" * 30 + "x": 4})),
    "weights: empty": (WEIGHTS, content(b"")),
    "weights: folder": (WEIGHTS, as_folder),
    "weights: fifo": (WEIGHTS, as_fifo),
    "weights: device": (WEIGHTS, as_link_to("/dev/zero")),
    "weights: sparse": (WEIGHTS, sparse),
    "weights: a pickle": (WEIGHTS, pickled),
    "weights: a link out": (WEIGHTS, as_link_to("../checkpoint-10/adapter_model.safetensors")),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_named_in_a_short_message(own_lora_run: LoraRun, what: str) -> None:
    name, damage = DAMAGES[what]
    path = own_lora_run.folder(60) / name
    damage(path)
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoints(own_lora_run.path)
    assert time.process_time() - start < 5
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert open_checkpoints(own_lora_run.path, skip_damaged=True).steps == (10, 20, 30, 40, 50)


COMMANDS = {"analyze": (), "plan": ("--horizon", "10"), "backtest": (), "extrapolate": ("--horizon", "10")}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_finds_a_flipped_bit_of_a_value_and_skips_it_on_request(
    own_lora_run: LoraRun, command: str, cli: Cli, tmp_path: Path
) -> None:
    seal(own_lora_run.folder(60))
    path = own_lora_run.folder(60) / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    out = ["--out", tmp_path / "out"] if command == "extrapolate" else []
    arguments = (command, "--checkpoints", own_lora_run.path, *COMMANDS[command], *out)
    outcome = cli(*arguments)
    if command == "plan":  # which reads no values
        assert outcome.code == 0
    else:
        assert outcome.code == 3
        assert str(path) in outcome.err.splitlines()[-1]
    outcome = cli(*arguments, "--skip-damaged")
    assert outcome.code == 0, outcome.err
    assert f"skipped {path.parent}, step 60: " in " ".join((outcome.out + outcome.err).split())


LOGS = TEXTS | {"a log that is no list": content('{"log_history": 5}')}


@pytest.mark.parametrize("damage", LOGS.values(), ids=LOGS)
def test_a_damaged_log_of_the_trainer_is_named(own_lora_run: LoraRun, damage: Damage) -> None:
    path = own_lora_run.folder(60) / STATE
    damage(path)
    with raises_kind("checkpoint-damaged", path):
        open_checkpoints(own_lora_run.path).metrics(60)


INDEXES = {
    "outside": ({"a": "../secret.safetensors"}, "checkpoint-unsafe-path"),
    "absolute": ({"a": "/etc/passwd"}, "checkpoint-unsafe-path"),
    "dots": ({"a": ".."}, "checkpoint-unsafe-path"),
    "nothing": ({"a": ""}, "checkpoint-unsafe-path"),
    "a folder": ({"a": "sub/1.safetensors"}, "checkpoint-unsafe-path"),
    "NUL": ({"a": "1.safe\0tensors"}, "checkpoint-unsafe-path"),
    "long": ({"a": "a" * 300}, "checkpoint-unsafe-path"),
    "surrogate": ({"a": "\ud800"}, "checkpoint-unsafe-path"),
    "link": ({"a": "link.safetensors"}, "checkpoint-unsafe-path"),
    "itself": ({"a": "model.safetensors.index.json"}, "checkpoint-damaged"),
    "absent": ({"a": "2.safetensors"}, "checkpoint-incomplete"),
    "fifo": ({"a": "fifo.safetensors"}, "checkpoint-damaged"),
    "pickle": ({"a": "1.bin"}, "checkpoint-pickle"),
}


@pytest.mark.parametrize("what", INDEXES)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "run" / "checkpoint-10"
    folder.mkdir(parents=True)
    for path in (folder / "1.safetensors", tmp_path / "run" / "secret.safetensors"):
        save_file({"a": torch.zeros(2, 2)}, path)
    torch.save({"a": torch.zeros(2, 2)}, folder / "1.bin")
    os.mkfifo(folder / "fifo.safetensors")
    (folder / "link.safetensors").symlink_to("../secret.safetensors")
    index, kind = INDEXES[what]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with raises_kind(kind, folder):
        open_checkpoints(tmp_path / "run")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_matrices_of_integers_or_without_values_are_skipped(tmp_path: Path, shape: tuple[int, int]) -> None:
    for step in (10, 20):
        model(tmp_path / f"checkpoint-{step}", step, none=torch.zeros(shape), packed=torch.ones(2, 2).byte())
    source = open_checkpoints(tmp_path)
    assert [parameter.name for parameter in source.parameters] == ["w.weight"]
    assert source.skipped == {"none": "has no values", "packed": "stored as integers; stays as it is"}


def test_an_adapter_of_integers_or_without_values_is_named(tmp_path: Path) -> None:
    weights = adapter(tmp_path / "checkpoint-10", 10) / WEIGHTS
    whole = load_file(weights)
    for damaged in (
        {key: value.int() for key, value in whole.items()},
        {key: value[:, :0] if "lora_A" in key else value for key, value in whole.items()},
    ):
        save_file(damaged, weights)
        with raises_kind("checkpoint-damaged", weights, "self_attn.q_proj"):
            open_checkpoints(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint-99999999999999999999", "step-" + "9" * 200, "lora-99999999999999999999"])
def test_a_number_that_is_too_large_for_a_step_is_named(tmp_path: Path, name: str) -> None:
    adapter(tmp_path / name, 10)
    with raises_kind("checkpoint-ambiguous-step", name):
        open_checkpoints(tmp_path)


RESULT = {"steps": 20, "seconds": {"rl": 1.0}, "accuracy": {"final": 0.5}, "jumps": [], "folder": "x"}


@pytest.mark.parametrize("damage", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["result.json", "compare.json"])
def test_the_report_names_a_damaged_result(tmp_path: Path, name: str, damage: Damage, cli: Cli) -> None:
    (tmp_path / "journal.jsonl").write_bytes(json_line({"event": "start", "step": 0}))
    path = tmp_path / name
    if name == "compare.json":
        write_comparison(tmp_path, comparison(seeds=1))
    else:
        path.write_text(json.dumps(RESULT))
    damage(path)
    outcome = cli("report", tmp_path)
    assert outcome.code == 3
    assert outcome.err.startswith(f"CheckpointError: {path} ")


YAMLS: dict[str, Damage] = {
    "empty": content(b""),
    "missing": Path.unlink,
    "a list": content("- steps"),
    "text": content("just text"),
    "a list for a key": content("? [1, 2]\n: 3"),
    "a tab": content("steps: 1\n\tseed: 2"),
    "an unknown anchor": content("a: *nobody"),
    "a number that is none": content("a: !!int many"),
    "two documents": content("a: 1\n---\nb: 2"),
    "NUL bytes": content(b"steps: \0"),
    "no UTF-8": content(b"steps: \xff"),
    "brackets": content('{"steps": ' + "[" * 20_000),
    "braces": content("{a: " * 5000),
    "indented": content("".join(" " * i + "a:\n" for i in range(1200))),
    "dashes": content("- " * 20_000),
    "values": content("a: [" + "1, " * 300_000 + "1]"),
    "keys": content("".join(f"k{i}: 1\n" for i in range(50_000))),
    "digits": content("steps: 1" + "0" * 10_000),
    "hexadecimal": content("steps: 0x" + "f" * 10_000),
    "sixties": content("steps: 1" + ":01" * 300_000),
    "a date": content("steps: 2024-13-45"),
    "a bomb": content(
        "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
    ),
    "a loop": content("a: &a [*a]"),
    "an object": content("steps: !!python/object/apply:os.system [ls]"),
    "more than 1 MiB": content("#" + "x" * 2**21),
    "folder": as_folder,
    "fifo": as_fifo,
    "device": as_link_to("/dev/zero"),
    "sparse": sparse,
    "a loop of links": as_link_to_itself,
}


@pytest.mark.parametrize("what", YAMLS)
def test_a_hostile_config_is_named_in_a_short_message(tmp_path: Path, what: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("steps: 1")
    YAMLS[what](path)
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_yaml(path, "as documented")
    assert time.process_time() - start < 5
    assert caught.value.kind in ("config-yaml", "config-missing-file", "config-invalid-value")
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 2000


def test_every_command_with_a_config_names_it(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "config.yaml"
    sparse(path)
    (tmp_path / "journal.jsonl").write_bytes(json_line({"event": "start", "step": 0}))
    for command in (("run", path, "--dry-run"), ("plan", path), ("compare", path, "--dry-run"), ("report", tmp_path)):
        outcome = cli(*command)
        assert outcome.code == 2, command
        assert outcome.err.startswith(f"ConfigError: {path}"), command


@pytest.mark.parametrize("number", ["1" + "0" * 30, "-0x" + "f" * 20, "1:00" + ":00" * 20])
def test_an_integer_beyond_64_bits_is_refused(number: str) -> None:
    with raises_kind("config-yaml", "64 bits"):
        parse_yaml(f"a: {number}", "here")
    assert parse_yaml(f"a: {2**64 - 1}", "here") == {"a": 2**64 - 1}


PATHS = {"NUL": "a\0b", "long": "a" * 300, "loop": "loop/x", "a FIFO's folder": "fifo/x"}


@pytest.mark.parametrize("what", PATHS)
@pytest.mark.parametrize("key", ["model", "train", "base"])
def test_an_impossible_path_is_a_config_error(tmp_path: Path, key: str, what: str, cli: Cli) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    training = {"model": ".", "data": {"train": "."}}
    if key == "base":
        race = {"base": PATHS[what], "steps": 1, "seeds": 1}
    else:
        (training if key == "model" else training["data"])[key] = PATHS[what]
        race = {"steps": 1, "seeds": 1, "run": {"training": training}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"steps": 1, "training": training}))
        outcome = cli("run", tmp_path / "run.yaml", "--dry-run")
        assert outcome.code == 2
        assert outcome.err.startswith(f"ConfigError: {tmp_path / 'run.yaml'}: ")
    (tmp_path / "race.yaml").write_text(yaml.safe_dump(race))
    outcome = cli("compare", tmp_path / "race.yaml", "--dry-run")
    assert outcome.code == 2
    assert outcome.err.startswith(f"ConfigError: {tmp_path}")


@pytest.mark.parametrize(
    ("fields", "figures"),
    [
        ({"seeds": 10**12}, ("seeds", "10000")),
        ({"steps": 10**12}, ("steps", "1000000")),
        ({"tuned": {f"training.x{i}": list(range(10)) for i in range(20)}}, ("10000 combinations",)),
    ],
)
def test_a_comparison_of_more_than_can_be_run_is_refused_at_once(
    tmp_path: Path, cli: Cli, fields: dict[str, object], figures: tuple[str, ...]
) -> None:
    (tmp_path / "train.jsonl").write_text("")
    data = {"train": "train.jsonl", "validation": "train.jsonl"}
    race = {"steps": 100, "seeds": 1, "run": {"training": {"model": ".", "data": data}}} | fields
    (tmp_path / "race.yaml").write_text(yaml.safe_dump(race))
    outcome = cli("compare", tmp_path / "race.yaml", "--dry-run")
    assert outcome.code == 2
    assert all(figure in outcome.err for figure in figures), outcome.err


MEASURE = """
import resource, sys
from pathlib import Path
from next_core.errors import NextCoreError
from next_core.storage.reading import parse_json, read_bytes
from next_core.storage.yaml_files import load_yaml
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, used + 400 * 2**20))
for path in map(Path, sys.argv[1:]):
    try:
        print(len(load_yaml(path, "") if path.suffix == ".yaml" else parse_json(read_bytes(path))))
    except (NextCoreError, ValueError) as error:
        print(type(error).__name__)
"""


def test_huge_files_take_little_memory(tmp_path: Path) -> None:
    bomb, values, large, huge = (tmp_path / name for name in ("bomb.yaml", "values.yaml", "large.json", "sparse.json"))
    YAMLS["a bomb"](bomb)
    YAMLS["values"](values)
    large.write_text("[" + "[]," * 1_300_000 + "[]]")  # just small enough to be read
    sparse(huge)
    command = [sys.executable, "-c", MEASURE, *map(str, (bomb, values, large, huge))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ConfigError", "ConfigError", "1300001", "ValueError"]

"""Files made to hurt: each ends in one message that names it, at once, through every command that meets it."""

from __future__ import annotations

import json
import os
import shutil
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
from next_core.storage.yaml_files import parse_yaml
from tests.conftest import LoraRun, Outcome
from tests.report.made import comparison, write_comparison
from tests.sources.models import adapter, model

Damage = Callable[[Path], None]
CONFIG, WEIGHTS, STATE = "adapter_config.json", "adapter_model.safetensors", "trainer_state.json"
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def bounded_time() -> Iterator[None]:
    """Whoever waits for a FIFO is woken."""

    def late(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("it took more than 30 seconds")  # which no reader catches

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def content(data: bytes | str) -> Damage:
    def write(path: Path) -> None:
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    return write


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_link_to(target: str) -> Damage:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return link


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**43)


def pickled(path: Path) -> None:
    tensors = {key: value.clone() for key, value in load_file(path).items()}  # the file is mapped
    torch.save(tensors, path)


def changed(**fields: object) -> Damage:
    """An adapter's config with other fields; Python writes NaN and Infinity as they are."""

    def write(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return write


def digits(path: Path) -> None:
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 8' + "0" * 10_000))


TEXTS: dict[str, Damage] = {
    "empty": content(b""),
    "NUL bytes": content(b"\0" * 100),
    "no UTF-8": content(b'{"\xff": 1}'),
    "nested": content('{"a":' * 100_000),
    "huge": content("[" + "[]," * 3_000_000 + "[]]"),
    "a list": content("[]"),
    "truncated": truncated,
    "folder": as_folder,
    "fifo": as_fifo,
    "device": as_link_to("/dev/zero"),
    "loop": as_link_to("adapter_config.json"),
    "sparse": sparse,
}
DAMAGES: dict[str, tuple[str, Damage]] = {
    **{f"config: {name}": (CONFIG, damage) for name, damage in TEXTS.items()},
    "config: digits": (CONFIG, digits),
    "config: NaN": (CONFIG, changed(lora_alpha=float("nan"))),
    "config: Infinity": (CONFIG, changed(r=float("inf"))),
    "config: a text": (CONFIG, changed(lora_alpha="8")),
    "config: too many patterns": (CONFIG, changed(rank_pattern={f"x{i}": 4 for i in range(30_000)})),
    "config: no patterns": (CONFIG, changed(alpha_pattern=["q_proj"])),
    "config: no expression": (CONFIG, changed(alpha_pattern={"(": 4})),
    "config: an endless expression": (CONFIG, changed(rank_pattern={"(.+)+x": 4})),
    "config: another": (CONFIG, changed(rank_pattern={"(a|a|.)?" * 30 + "x": 4})),
    "weights: empty": (WEIGHTS, content(b"")),
    "weights: truncated": (WEIGHTS, truncated),
    "weights: folder": (WEIGHTS, as_folder),
    "weights: fifo": (WEIGHTS, as_fifo),
    "weights: device": (WEIGHTS, as_link_to("/dev/zero")),
    "weights: sparse": (WEIGHTS, sparse),
    "weights: a pickle": (WEIGHTS, pickled),
    "weights: a link out": (WEIGHTS, as_link_to("../checkpoint-10/adapter_model.safetensors")),
}
COMMANDS = {
    "analyze": (),
    "plan": ("--horizon", "10"),
    "backtest": (),
    "extrapolate": ("--horizon", "10", "--out", "out"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_one_message_that_names_the_file(
    own_lora_run: LoraRun,
    what: str,
    cli: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    name, damage = DAMAGES[what]
    path = own_lora_run.folder(60) / name
    damage(path)
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoints(own_lora_run.path)
    assert time.process_time() - start < 5
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000
    for command, more in COMMANDS.items():
        outcome = cli(command, "--checkpoints", own_lora_run.path, *more)
        assert (outcome.code, outcome.err) == (3, f"CheckpointError: {caught.value}\n"), command
    assert open_checkpoints(own_lora_run.path, skip_damaged=True).steps == (10, 20, 30, 40, 50)


def test_a_flipped_bit_is_found_by_every_command_that_reads_values_and_left_out_on_request(
    own_lora_run: LoraRun, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    for step in (0, 10, 20, 30, 40, 50, 60):
        seal(own_lora_run.folder(step))
    path = own_lora_run.folder(60) / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for command, more in COMMANDS.items():
        out = ["--out", tmp_path / command] if command == "extrapolate" else []
        outcome = cli(command, "--checkpoints", own_lora_run.path, *more, *out)
        if command == "plan":  # which reads no values
            assert outcome.code == 0
        else:
            assert outcome.code == 3
            assert outcome.err.splitlines()[-1].startswith(f"CheckpointError: {path} is damaged: its sha256 is not")
        outcome = cli(command, "--checkpoints", own_lora_run.path, "--skip-damaged", *more, *out)
        assert outcome.code == 0, outcome.err
        assert f"left out {path.parent}, step 60: " in " ".join((outcome.out + outcome.err).split())


@pytest.mark.parametrize("damage", TEXTS.values(), ids=TEXTS)
def test_a_damaged_log_of_the_trainer_is_named(own_lora_run: LoraRun, damage: Damage) -> None:
    path = own_lora_run.folder(60) / STATE
    if damage is TEXTS["loop"]:
        damage = as_link_to(STATE)
    damage(path)
    with pytest.raises(CheckpointError, match=rf"{path}"):
        if damage is TEXTS["huge"]:
            assert open_checkpoints(own_lora_run.path).metrics(60) is None
        open_checkpoints(own_lora_run.path).metrics(60)


INDEXES = {
    "outside": {"a": "../secret.safetensors"},
    "absolute": {"a": "/etc/passwd"},
    "dots": {"a": ".."},
    "nothing": {"a": ""},
    "NUL": {"a": "1.safe\0tensors"},
    "long": {"a": "a" * 300},
    "surrogate": {"a": "\ud800"},
    "number": {"a": 1},
    "list": ["a"],
    "null": None,
    "itself": {"a": "model.safetensors.index.json"},
    "absent": {"a": "2.safetensors"},
    "fifo": {"a": "fifo.safetensors"},
    "pickle": {"a": "1.bin"},
    "link": {"a": "link.safetensors"},
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
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": INDEXES[what]}))
    with pytest.raises(CheckpointError, match=rf"{folder}"):
        open_checkpoints(tmp_path / "run")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_matrices_without_values_do_no_harm(tmp_path: Path, shape: tuple[int, int]) -> None:
    for step in (10, 20):
        model(tmp_path / f"checkpoint-{step}", step, none=torch.zeros(shape))
    source = open_checkpoints(tmp_path)
    assert [parameter.name for parameter in source.parameters] == ["w.weight"]
    assert "none" in source.skipped


def test_an_adapter_of_whole_numbers_or_of_nothing_is_named(tmp_path: Path) -> None:
    weights = adapter(tmp_path / "checkpoint-10", 10) / WEIGHTS
    whole = load_file(weights)
    save_file({key: value.int() for key, value in whole.items()}, weights)
    with pytest.raises(CheckpointError, match=rf"{weights}: '.*lora_A\.weight' is stored as torch\.int32"):
        open_checkpoints(tmp_path)
    save_file({key: value[:, :0] if "lora_A" in key else value for key, value in whole.items()}, weights)
    with pytest.raises(CheckpointError, match=rf"{weights}: '.*' has no rows or no columns"):
        open_checkpoints(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint-99999999999999999999", "step-" + "9" * 200, "lora-99999999999999999999"])
def test_a_number_that_can_be_no_step_is_named(tmp_path: Path, name: str) -> None:
    adapter(tmp_path / name, 10)
    with pytest.raises(CheckpointError, match=r"is no step, it is too large"):
        open_checkpoints(tmp_path)


@pytest.mark.parametrize(
    "record", ['{"step": -1}', '{"step": true}', '{"step": 1e3}', '{"step": 10000000000000000}', "{}"]
)
@pytest.mark.parametrize("name", ["jump.json", "undone.json"])
def test_a_jump_whose_step_is_none_is_named(tmp_path: Path, name: str, record: str) -> None:
    adapter(tmp_path / "checkpoints" / "checkpoint-10", 10)
    jump = tmp_path / "jumps" / "0001"
    jump.mkdir(parents=True)
    (jump / "jump.json").write_text('{"step": 10}')
    (jump / name).write_text(record)
    with pytest.raises(CheckpointError, match=rf"{jump / name} names no step; restore it"):
        open_checkpoints(tmp_path / "checkpoints")


def test_names_that_look_like_markup_are_shown_as_they_are(
    lora_run: LoraRun, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    path = tmp_path / "run[/red]" / "checkpoints"
    shutil.copytree(lora_run.path, path)
    (path / "checkpoint-60" / WEIGHTS).write_bytes(b"")
    outcome = cli("analyze", "--checkpoints", path, "--skip-damaged")
    assert outcome.code == 0
    assert f"left out {path}" in " ".join((outcome.out + outcome.err).split())


RESULT = {"steps": 20, "seconds": {"rl": 1.0}, "accuracy": {"final": 0.5}, "jumps": [], "folder": "x"}


@pytest.mark.parametrize("damage", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["result.json", "compare.json"])
def test_a_damaged_result_is_named_by_the_report(
    tmp_path: Path, name: str, damage: Damage, cli: Callable[..., Outcome]
) -> None:
    (tmp_path / "journal.jsonl").write_bytes(json_line({"event": "start", "step": 0}))
    path = tmp_path / name
    if name == "compare.json":
        write_comparison(tmp_path, comparison(seeds=1))
    else:
        path.write_text(json.dumps(RESULT))
    (as_link_to(name) if damage is TEXTS["loop"] else damage)(path)
    outcome = cli("report", tmp_path)
    assert outcome.code == 3
    assert outcome.err.startswith(f"CheckpointError: {path} ")


@pytest.mark.parametrize("what", ["fifo", "folder", "sparse", "device"])
def test_a_config_of_a_run_that_cannot_be_read_is_named_by_the_report(
    tmp_path: Path, what: str, cli: Callable[..., Outcome]
) -> None:
    (tmp_path / "journal.jsonl").write_bytes(json_line({"event": "start", "step": 0}))
    (tmp_path / "config.yaml").write_text("steps: 1")
    TEXTS[what](tmp_path / "config.yaml")
    outcome = cli("report", tmp_path)
    assert outcome.code == 2
    assert outcome.err.startswith(f"ConfigError: {tmp_path / 'config.yaml'} cannot be read")


@pytest.mark.parametrize("missing", ["jump_step", "accepted", "reason", "accuracy"])
def test_a_verdict_that_lacks_something_is_named_by_the_report(tmp_path: Path, missing: str) -> None:
    from next_core.report.inputs import Recorded

    verdict = {"event": "verify", "step": 12, "jump_step": 10, "accepted": True, "reason": "x", "accuracy": 0.5}
    del verdict[missing]
    (tmp_path / "journal.jsonl").write_bytes(
        json_line({"event": "jump", "step": 10, "accepted": True}) + json_line(verdict)
    )
    with pytest.raises(CheckpointError, match=rf"journal\.jsonl, line 2 is damaged .it lacks '{missing}'"):
        Recorded(tmp_path)


YAMLS: dict[str, Damage] = {
    "empty": content(b""),
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
    "a long number": content("steps: " + "1" * 1_000_000 + "x"),
    "a date": content("steps: 2024-13-45"),
    "not a number": content("steps: .nan"),
    "a bomb": content(
        "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
    ),
    "a loop": content("a: &a [*a]"),
    "an object": content("steps: !!python/object/apply:os.system [ls]"),
    "huge": content("#" + "x" * 2**21),
    "folder": as_folder,
    "fifo": as_fifo,
    "device": as_link_to("/dev/zero"),
    "sparse": sparse,
}


@pytest.mark.parametrize("what", YAMLS)
def test_a_hostile_config_is_one_message_that_names_it(tmp_path: Path, what: str, cli: Callable[..., Outcome]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("steps: 1")
    YAMLS[what](path)
    start = time.process_time()
    for command in (("run", path, "--dry-run"), ("plan", path), ("compare", path, "--dry-run")):
        outcome = cli(*command)
        assert outcome.code == 2, command
        assert outcome.err.startswith(f"ConfigError: {path}"), command
        assert len(outcome.err) < 3000
    assert time.process_time() - start < 15


def test_a_config_that_is_a_loop_of_links_is_named(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    path = tmp_path / "config.yaml"
    path.symlink_to(path)
    for command in (("plan", path), ("compare", path, "--dry-run")):
        outcome = cli(*command)
        assert outcome.code == 2, command
        assert outcome.err.startswith(f"ConfigError: {path} cannot be read: Too many levels"), command


PATHS = {"NUL": "a\0b", "long": "a" * 300, "loop": "loop/x", "a FIFO's folder": "fifo/x"}


@pytest.mark.parametrize("what", PATHS)
@pytest.mark.parametrize("key", ["model", "train", "base"])
def test_a_path_that_can_be_none_is_a_mistake_of_the_config(
    tmp_path: Path, key: str, what: str, cli: Callable[..., Outcome]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    training = {"model": ".", "data": {"train": "."}}
    if key == "base":
        race = {"base": PATHS[what], "steps": 1, "seeds": 1}
    else:
        (training if key == "model" else training["data"])[key] = PATHS[what]  # type: ignore[index]
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
    ("fields", "why"),
    [
        ({"seeds": 10**12}, "seeds: at most 10000"),
        ({"steps": 10**12}, "steps: Input should be less than or equal to 1000000"),
        ({"tuned": {f"training.x{i}": list(range(10)) for i in range(20)}}, "more than 10000 combinations"),
    ],
)
def test_a_comparison_of_more_than_can_be_run_is_refused_at_once(
    tmp_path: Path, cli: Callable[..., Outcome], fields: dict[str, object], why: str
) -> None:
    (tmp_path / "train.jsonl").write_text("")
    data = {"train": "train.jsonl", "validation": "train.jsonl"}
    race = {"steps": 100, "seeds": 1, "run": {"training": {"model": ".", "data": data}}} | fields
    (tmp_path / "race.yaml").write_text(yaml.safe_dump(race))
    outcome = cli("compare", tmp_path / "race.yaml", "--dry-run")
    assert (outcome.code, why in outcome.err) == (2, True), outcome.err


MEASURE = """
import resource, sys
from pathlib import Path
from next_core.errors import NextCoreError
from next_core.config import load_config
from next_core.report.inputs import open_folder
from next_core.sources.tensor_files import read_json
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), used + int(sys.argv[1])))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for name in sys.argv[2:]:
    path = Path(name)
    read = load_config if path.suffix == ".yaml" else open_folder if path.is_dir() else read_json
    try:
        read(path)
    except NextCoreError as error:
        print(type(error).__name__, str(error)[:200].replace("\\n", " "))
"""


def test_what_is_huge_takes_little_memory_and_time(tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text("")
    YAMLS["a bomb"](tmp_path / "bomb.yaml")
    (tmp_path / "values.yaml").write_text("a: [" + "1, " * 300_000 + "1]")
    (tmp_path / "large.json").write_text('{"a": [' + "[]," * 1_300_000 + "[]]}")  # just small enough to be read
    sparse(tmp_path / "sparse.json")
    folder = tmp_path / "compared"
    folder.mkdir()
    (folder / "compare.json").write_text("[" + "[]," * 1_000_000 + "[]]")
    files = [tmp_path / name for name in ("bomb.yaml", "values.yaml", "large.json", "sparse.json", "compared")]
    command = [sys.executable, "-c", MEASURE, str(400 * 2**20), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kinds = [line.split()[0] for line in done.stdout.splitlines()]
    assert kinds == ["ConfigError", "ConfigError", "CheckpointError", "CheckpointError"], done.stdout


@pytest.mark.parametrize("number", ["1" + "0" * 30, "-0x" + "f" * 20, "1:00" + ":00" * 20])
def test_a_whole_number_beyond_64_bits_is_a_mistake_of_the_config(number: str) -> None:
    with pytest.raises(ConfigError, match="the number does not fit in 64 bits"):
        parse_yaml(f"a: {number}", "here")
    assert parse_yaml(f"a: {2**64 - 1}", "here") == {"a": 2**64 - 1}

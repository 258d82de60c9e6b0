"""The command line that OpenRLHF is given: what each setting becomes, and what is refused before anything starts."""

import contextlib
import json
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from next_backends.external import environment as external_environment
from next_backends.openrlhf import openrlhf_setup
from next_backends.openrlhf.command import FIELDS, REFUSED, Options, check_run, make_command
from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_backends.openrlhf.openrlhf_setup import parse
from next_core.run_config import RunConfig
from tests.backends.openrlhf.cpu import recorded_options
from tests.errors import raises_kind

Make = Callable[..., list[str]]
RING = ["--ds.ring_attn_size", "2", "--ds.packing_samples"]


@pytest.fixture
def trainer(tmp_path: Path) -> Options:
    """The options of one trainer process, which ``OpenRlhfSetup`` adds."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"max_position_embeddings": 32768}')
    return {
        "--actor.model_name_or_path": ("training.model", model),
        "--data.prompt_dataset": ("training.data.train", tmp_path / "train.jsonl"),
        "--reward.remote_url": ("training.reward", "http://127.0.0.1:1234/reward"),
    }


@pytest.fixture
def make(trainer: Options, tmp_path: Path) -> Make:
    """``make(training={...}, trainer={...}, **fields of the backend's block)``."""

    def command(training: dict[str, Any] | None = None, own: Options | None = None, **backend: Any) -> list[str]:
        fields = {"model": tmp_path / "model", "data": {"train": tmp_path / "train.jsonl"}, **(training or {})}
        run = RunConfig.model_validate({"steps": 100, "training": fields})
        config = OpenRlhfConfig.model_validate({"python": "python", **backend})
        return make_command(run, config, trainer | (own or {}))

    return command


def check(jump: str, extra: list[str] | None = None, training: dict[str, Any] | None = None, **run: Any) -> None:
    fields = {"model": Path("model"), "data": {"train": Path("train.jsonl")}, **(training or {})}
    config = OpenRlhfConfig(python=Path("python"), jump=jump, extra_args=extra or [])
    check_run(RunConfig.model_validate({"steps": 100, "training": fields, "predictor": "secant"} | run), config)


@pytest.mark.parametrize(
    ("algorithm", "estimator", "expected"),
    [
        ("grpo", None, "group_norm"),
        ("grpo", "dr_grpo", "dr_grpo"),
        ("rloo", None, "rloo"),
        ("reinforce++", None, "reinforce_baseline"),
        ("reinforce++", "reinforce", "reinforce"),
    ],
)
def test_each_algorithm_has_its_estimator(make: Make, algorithm: str, estimator: str | None, expected: str) -> None:
    found = recorded_options.parse(make({"algorithm": algorithm, "beta": 0.05}, estimator=estimator))
    assert found["--algo.advantage.estimator"] == expected
    assert found["--algo.kl.init_coef"] == 0.05
    assert ("--algo.kl.use_loss" in found) is (algorithm == "grpo")
    assert found["--algo.kl.estimator"] == ("k3" if algorithm == "grpo" else "k1")


def test_an_estimator_of_another_algorithm_is_refused_with_both_names(make: Make) -> None:
    with raises_kind("config-contradiction", "group_norm", "training.algorithm: rloo"):
        make({"algorithm": "rloo"}, estimator="group_norm")


def test_settings_reach_their_options(make: Make, trainer: Options) -> None:
    training = {"prompts_per_step": 4, "generations": 6, "temperature": 0.7, "max_new_tokens": 100}
    vllm = {"engines": 2, "tensor_parallel": 2, "sync": "gloo", "eager": True, "sleep": True}
    deepspeed = {"zero_stage": 3, "attention": "eager", "gradient_checkpointing": True}
    own = {"--ckpt.save_hf": ("", True), "--ckpt.disable_ds": ("", False), "--data.max_samples": ("", None)}
    found = recorded_options.parse(make(training, own, gpus=4, colocate="all", vllm=vllm, deepspeed=deepspeed))
    expected = {
        "--actor.adam.lr": 1e-5,
        "--actor.lr_warmup_ratio": 0,
        "--actor.model_name_or_path": str(trainer["--actor.model_name_or_path"][1]),
        "--actor.num_gpus_per_node": 4,
        "--algo.kl.init_coef": 0,  # OpenRLHF then makes no reference model
        "--data.max_len": 1124,
        "--ds.attn_implementation": "eager",
        "--ds.zero_stage": 3,
        "--rollout.n_samples_per_prompt": 6,
        "--rollout.temperature": 0.7,
        "--train.batch_size": 24,
        "--vllm.num_engines": 2,
        "--vllm.sync_backend": "gloo",
    }
    assert found | expected == found
    flags = {option for option, value in found.items() if value is True}
    assert flags == {
        "--actor.gradient_checkpointing_enable",
        "--ckpt.save_hf",
        "--ds.enable_sleep",
        "--train.colocate_actor_ref",
        "--train.colocate_all",
        "--vllm.enable_sleep",
        "--vllm.enforce_eager",
    }
    assert "--data.max_samples" not in found
    assert recorded_options.parse(make(max_length=777))["--data.max_len"] == 777


@pytest.mark.parametrize(
    ("rollouts", "gpus", "asked", "extra", "expected"),
    [
        ((4, 2), 1, 64, [], 8),
        ((4, 2), 2, 64, [], 4),
        ((4, 3), 1, 8, [], 6),
        ((16, 8), 4, 8, [], 8),
        ((1, 7), 1, 5, [], 1),
        ((3, 3), 2, 9, RING, 9),  # a ring of GPUs is one data-parallel rank
        ((3, 3), 2, 9, ["--ds.ring_attn_size=2"], 9),
    ],
)
def test_a_micro_batch_divides_the_rollouts_of_a_rank(
    make: Make, rollouts: tuple[int, int], gpus: int, asked: int, extra: list[str], expected: int
) -> None:
    training = {"prompts_per_step": rollouts[0], "generations": rollouts[1]}
    found = recorded_options.parse(make(training, gpus=gpus, micro_batch=asked, extra_args=extra))
    assert found["--train.micro_batch_size"] == found["--rollout.micro_batch_size"] == expected


@pytest.mark.parametrize(
    ("extra", "gpus", "names"), [([], 2, ["9 rollouts", "2 data-parallel"]), (RING, 3, ["ring_attn_size 2", "3 GPUs"])]
)
def test_rollouts_that_ranks_cannot_share_fail(make: Make, extra: list[str], gpus: int, names: list[str]) -> None:
    with raises_kind("config-contradiction", *names):
        make({"prompts_per_step": 3, "generations": 3}, gpus=gpus, extra_args=extra)


def test_the_longest_sequence_is_what_the_model_can_take(make: Make, tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 64}')
    assert recorded_options.parse(make({"max_new_tokens": 16}))["--data.max_len"] == 64
    with raises_kind("config-contradiction", "backend.max_length", "64 tokens"):
        make({"max_new_tokens": 64})


@pytest.mark.parametrize(
    ("targets", "expected"),
    [(["q_proj", "v_proj"], ["q_proj", "v_proj"]), ("q_proj", ["q_proj"]), ("all-linear", None)],
)
def test_lora_becomes_rank_alpha_and_modules(make: Make, targets: Any, expected: list[str] | None) -> None:
    lora = {"rank": 4, "alpha": 8, "target_modules": targets}
    found = recorded_options.parse(make({"lora": lora}, extra_args=["--train.max_epochs", "2"]))
    assert (found["--ds.lora.rank"], found["--ds.lora.alpha"]) == (4, 8)
    assert found.get("--ds.lora.target_modules") == expected
    assert not any(word.startswith("--ds.lora") for word in make({"lora": None}))


@pytest.mark.parametrize(
    ("lora", "key"),
    [
        ({"alpha": 8.5}, "training.lora.alpha"),
        ({"rslora": True}, "training.lora.rslora"),
        ({"target_modules": ".*_proj"}, "training.lora.target_modules"),
        ({"target_modules": []}, "training.lora.target_modules"),
    ],
)
def test_an_adapter_that_openrlhf_cannot_make_is_refused(make: Make, lora: dict[str, Any], key: str) -> None:
    with raises_kind("backend-unsupported", key):
        make({"lora": lora})


@pytest.mark.parametrize(
    ("option", "path", "refused"),
    [
        ("--data.prompt_dataset", "a,b.jsonl", True),
        ("--data.prompt_dataset", "a@b.jsonl", True),
        ("--reward.remote_url", "/rewards/a,b.py", True),
        ("--reward.remote_url", "/rewards/a@b.py", False),
    ],
)
def test_a_path_that_openrlhf_would_split_is_refused(make: Make, option: str, path: str, refused: bool) -> None:
    own = {option: ("", path)}
    if refused:
        with raises_kind("config-invalid-value", path):
            make(own=own)
    else:
        assert recorded_options.parse(make(own=own))[option] == path


def test_extra_options_come_last_so_that_they_win(make: Make) -> None:
    extra = ["--train.max_epochs", "2", "--actor.lr_warmup_ratio", "0.1", "--actor.adam.betas", "0.9", "0.999"]
    extra += ["--algo.dynamic_filtering_enable", "--ds.lora.dropout", "0.1"]
    command = make(extra_args=extra)
    assert command[-len(extra) :] == extra
    assert recorded_options.parse(command)["--actor.lr_warmup_ratio"] == 0.1
    assert make(extra_args=["--train.max_epochs", 2])[-2:] == ["--train.max_epochs", "2"]  # YAML's number is a word


@pytest.mark.parametrize(
    ("extra", "setter"),
    [
        *((option, field) for option, field in FIELDS.items()),
        ("--ckpt.best_metric_key", "save_every"),
        ("--ds.lora.rank", "training.lora"),
        ("--reward.remote_url", "training.reward"),
        ("--train.colocate_all", "backend.colocate"),
        ("--train.batch", "training.prompts_per_step"),  # the parser takes abbreviations
        ("--algo.kl.use_loss", "training.algorithm"),
    ],
)
def test_an_extra_option_that_the_run_config_sets_is_refused_with_its_key(make: Make, extra: str, setter: str) -> None:
    with raises_kind("config-contradiction", extra, setter):
        make(extra_args=[extra, "1"])
    with raises_kind("config-contradiction", extra):
        make({"lora": None}, extra_args=[f"{extra}=1"])


@pytest.mark.parametrize(
    ("extra", "refused"),
    [
        *(([option, "2"], option) for option in REFUSED if option != "--critic."),
        (["--critic.freezing_steps", "5"], "--critic.freezing_steps"),
        (["--ds.tensor_parallel_size=2"], "--ds.tensor_parallel_size"),
        (["--train.async"], "--train.async"),
    ],
)
def test_an_extra_option_that_cannot_work_is_refused(make: Make, extra: list[str], refused: str) -> None:
    with raises_kind("backend-unsupported", f"backend.extra_args: {refused} "):
        make(extra_args=extra)


def test_all_options_that_we_know_are_openrlhfs_and_no_other_option_abbreviates_one_of_them(make: Make) -> None:
    recorded = json.loads(recorded_options.RECORD.read_text())
    known = {word for word in make() if word.startswith("--")} | set(FIELDS) | set(REFUSED) - {"--critic."}
    assert known <= set(recorded)
    assert not [option for option in recorded if any(k.startswith(option) and k != option for k in known)]


@pytest.mark.parametrize(
    ("block", "key"),
    [
        ({"vllm": {"sleep": True}}, "colocate: all"),
        ({"colocate": "all", "gpus": 2}, r"gpus = 2.* = 1"),
        ({"reward_file": "reward.txt"}, "reward.txt"),
        ({"deepspeed": {"dtype": "fp16"}}, "deepspeed.dtype"),
        ({"vllm": {"gpu_memory": 1.5}}, "vllm.gpu_memory"),
        ({"deepspeed": {"zero_stage": 4}}, "deepspeed.zero_stage"),
        ({"engine": 1}, "engine"),
    ],
)
def test_a_block_that_contradicts_itself_is_refused(block: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        OpenRlhfConfig.model_validate({"python": "python", **block})


MANY = {"schedule": {"observe": 50, "every": 2, "jump_every": 2}}


@pytest.mark.parametrize(
    ("jump", "run", "names"),
    [
        ("swap", MANY, None),
        ("restart", {"training": {"lr_scheduler": "cosine"}}, None),
        ("restart", MANY, ["backend.jump: restart", "26 jumps"]),
        ("swap", {"extra": RING}, ["training.evaluation"]),
        ("restart", {"extra": RING, "training": {"evaluation": "generate"}}, None),
    ],
)
def test_what_a_kind_of_jump_cannot_do_is_refused(jump: str, run: dict[str, Any], names: list[str] | None) -> None:
    with contextlib.nullcontext() if names is None else raises_kind("backend-unsupported", *names):
        check(jump, **run)


def stand_in(tmp_path: Path, script: str, **env: str) -> OpenRlhfConfig:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return OpenRlhfConfig(python=python, env=env)


def test_the_parsers_answer_is_found_among_other_lines(tmp_path: Path) -> None:
    config = stand_in(tmp_path, f"""echo noise; echo '{external_environment.ANSWER}{{"a": 1}}'; echo more""")
    assert parse(config, []) == {"a": 1}


@pytest.mark.parametrize(
    ("script", "kind", "name"),
    [
        ("echo usage >&2; echo 'error: argument --x' >&2; exit 2", "config-invalid-value", "argument --x"),
        ("echo 'it has OpenRLHF 0.10.1' >&2; exit 1", "config-missing-package", "openrlhf==0.11.2"),
        ("echo boom; exit 3", "config-missing-package", "boom"),
        ("exec sleep 60", "config-missing-package", "0.5 s"),
    ],
)
def test_a_silent_parser_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, kind: str, name: str
) -> None:
    if "sleep" in script:
        monkeypatch.setattr(external_environment, "TIMEOUT", 0.5)
    with raises_kind(kind, name):
        parse(stand_in(tmp_path, script), [])


def test_an_interpreter_that_cannot_be_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = OpenRlhfConfig.model_validate({"python": "~/venv/bin/python"})
    with raises_kind("config-missing-package", tmp_path / "venv/bin/python", "openrlhf==0.11.2"):
        parse(config, [])


@pytest.fixture
def real(openrlhf_python: Path, openrlhf_env: dict[str, str]) -> OpenRlhfConfig:
    return OpenRlhfConfig(python=openrlhf_python, env=openrlhf_env)


@pytest.mark.openrlhf
@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "reinforce++"])
def test_openrlhf_itself_takes_what_is_made(make: Make, real: OpenRlhfConfig, algorithm: str, tmp_path: Path) -> None:
    training = {"algorithm": algorithm, "beta": 0.01, "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}}
    if algorithm == "rloo":
        training["lora"] = None
    args = parse(real, make(training, extra_args=["--train.max_epochs", "2"]))
    assert args["actor"]["model_name_or_path"] == str(tmp_path / "model")
    assert args["algo"]["kl"]["use_loss"] is (algorithm == "grpo")
    assert args["train"]["batch_size"] == args["rollout"]["batch_size"] * args["rollout"]["n_samples_per_prompt"]
    assert args["train"]["max_epochs"] == 2
    assert args["reward"]["remote_url"] == ["http://127.0.0.1:1234/reward"]
    assert args["critic"]["model_name_or_path"] is None
    expected = (0, "all-linear") if algorithm == "rloo" else (4, ["q_proj", "v_proj"])
    assert (args["ds"]["lora"]["rank"], args["ds"]["lora"]["target_modules"]) == expected
    assert math.isclose(args["actor"]["adam"]["lr"], 1e-5)


@pytest.mark.openrlhf
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--algo.dynamic_filtering_enable", "--algo.dynamic_filtering_range", "1", "0"], "reward_clip_range[0]"),
        (["--zzz"], "unrecognized arguments: --zzz"),
    ],
)
def test_openrlhfs_own_refusals_are_reported(make: Make, real: OpenRlhfConfig, words: list[str], name: str) -> None:
    with raises_kind("config-invalid-value", name):
        parse(real, [*make(), *words])


@pytest.mark.openrlhf
def test_another_release_is_refused(make: Make, real: OpenRlhfConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openrlhf_setup, "VERSION", "0.11.1")
    with raises_kind("config-missing-package", "it has OpenRLHF 0.11.2"):
        parse(real, make())


@pytest.mark.openrlhf
def test_the_recorded_options_are_openrlhfs(tmp_path: Path, real: OpenRlhfConfig) -> None:
    command: list[str | Path] = [real.python, Path(recorded_options.__file__), tmp_path / "record"]
    subprocess.run(command, env={**os.environ, **real.env}, check=True, capture_output=True, timeout=300)
    assert (tmp_path / "record").read_text() == recorded_options.RECORD.read_text()

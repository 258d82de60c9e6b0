"""The command line that OpenRLHF is given: what each setting becomes, and what is refused before anything starts."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from next_backends.openrlhf import environment
from next_backends.openrlhf import known_options as options
from next_backends.openrlhf.command import Places, Segment, make_command
from next_backends.openrlhf.environment import ask_parser, check_python
from next_backends.openrlhf.known_options import check_options
from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_core.errors import ConfigError
from next_core.run_config import RunConfig

SEGMENT = Segment(episodes=1, samples=None, seed=3, save_every=None, save_hf=False, save_deepspeed=True, load=False)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"max_position_embeddings": 32768}')
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    return Places(model, data, "http://127.0.0.1:1234/reward", tmp_path / "ckpt", tmp_path / "final")


@pytest.fixture
def make(places: Places) -> Callable[..., list[str]]:
    """``make(training={...}, segment=..., places=..., **fields of the backend's block)``."""

    def command(
        training: dict[str, Any] | None = None, segment: Segment = SEGMENT, places: Places = places, **backend: Any
    ) -> list[str]:
        fields = {"model": places.model, "data": {"train": places.data}, **(training or {})}
        run = RunConfig.model_validate({"steps": 100, "training": fields})
        return make_command(run, OpenRlhfConfig.model_validate({"python": "python", **backend}), places, segment)

    return command


def values(command: list[str], option: str) -> list[str] | None:
    """What follows an option, up to the next one; None where it is not there."""
    if option not in command:
        return None
    assert command.count(option) == 1
    rest = command[command.index(option) + 1 :]
    ends = [index for index, word in enumerate(rest) if word.startswith("--")]
    return rest[: ends[0]] if ends else rest


def value(command: list[str], option: str) -> str | None:
    found = values(command, option)
    return None if found is None else " ".join(found)


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
def test_each_algorithm_has_its_estimator(make: Any, algorithm: str, estimator: str | None, expected: str) -> None:
    command = make({"algorithm": algorithm}, estimator=estimator)
    assert value(command, "--algo.advantage.estimator") == expected
    check_options(command)


def test_an_estimator_of_another_algorithm_is_refused_with_both_names(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"group_norm .*training\.algorithm: rloo, which takes rloo"):
        make({"algorithm": "rloo"}, estimator="group_norm")


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "reinforce++"])
def test_the_divergence_is_in_grpos_loss_and_in_the_others_reward(make: Any, algorithm: str) -> None:
    command = make({"algorithm": algorithm, "beta": 0.05})
    assert value(command, "--algo.kl.init_coef") == "0.05"
    assert ("--algo.kl.use_loss" in command) is (algorithm == "grpo")
    assert value(command, "--algo.kl.estimator") == ("k3" if algorithm == "grpo" else "k1")


def test_without_beta_there_is_no_divergence(make: Any) -> None:
    command = make()
    assert float(value(command, "--algo.kl.init_coef") or "nan") == 0  # with 0 OpenRLHF makes no reference model
    assert "--algo.kl.use_loss" not in command


def test_a_step_is_all_roll_outs_of_its_prompts(make: Any, places: Places) -> None:
    command = make(
        {"prompts_per_step": 4, "generations": 6, "temperature": 0.7, "max_new_tokens": 100, "learning_rate": 2e-5},
        segment=replace(SEGMENT, episodes=2, samples=12, save_every=5, save_hf=True, save_deepspeed=False, load=True),
    )
    expected = {
        "--actor.model_name_or_path": str(places.model),
        "--rollout.batch_size": "4",
        "--rollout.n_samples_per_prompt": "6",
        "--train.batch_size": "24",
        "--rollout.temperature": "0.7",
        "--rollout.max_new_tokens": "100",
        "--data.max_len": "1124",
        "--data.prompt_dataset": str(places.data),
        "--data.input_key": "prompt",
        "--data.label_key": "answer",
        "--data.max_samples": "12",
        "--reward.remote_url": places.reward_url,
        "--train.num_episodes": "2",
        "--train.seed": "3",
        "--ckpt.path": str(places.checkpoints),
        "--ckpt.output_dir": str(places.output),
        "--ckpt.save_steps": "5",
        "--ckpt.save_hf": "",
        "--ckpt.disable_ds": "",
        "--ckpt.load_enable": "",
        "--actor.lr_scheduler": "constant",
        "--actor.lr_warmup_ratio": "0",
    }
    assert {option: value(command, option) for option in expected} == expected
    assert float(value(command, "--actor.adam.lr") or "nan") == 2e-5
    check_options(command)


def test_what_a_segment_does_not_ask_for_is_left_out(make: Any) -> None:
    command = make()
    assert value(command, "--ckpt.save_steps") == "-1"
    for option in ("--ckpt.save_hf", "--ckpt.disable_ds", "--ckpt.load_enable", "--data.max_samples"):
        assert option not in command


def test_a_part_of_a_step_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="20 prompts are no whole number of steps of 16"):
        make(segment=replace(SEGMENT, samples=20))


def test_the_blocks_of_the_backend_reach_their_options(make: Any) -> None:
    command = make(
        gpus=2,
        nodes=2,
        colocate="all",
        vllm={
            "engines": 2,
            "tensor_parallel": 2,
            "gpu_memory": 0.5,
            "sync": "gloo",
            "eager": True,
            "prefix_caching": True,
            "sleep": True,
        },
        deepspeed={"zero_stage": 3, "attention": "eager", "adam_offload": True, "gradient_checkpointing": True},
        max_length=777,
    )
    expected = {
        "--actor.num_nodes": "2",
        "--actor.num_gpus_per_node": "2",
        "--ref.num_nodes": "2",
        "--ref.num_gpus_per_node": "2",
        "--train.colocate_actor_ref": "",
        "--train.colocate_all": "",
        "--vllm.num_engines": "2",
        "--vllm.tensor_parallel_size": "2",
        "--vllm.gpu_memory_utilization": "0.5",
        "--vllm.sync_backend": "gloo",
        "--vllm.enforce_eager": "",
        "--vllm.enable_prefix_caching": "",
        "--vllm.enable_sleep": "",
        "--ds.enable_sleep": "",
        "--ds.zero_stage": "3",
        "--ds.param_dtype": "bf16",
        "--ds.attn_implementation": "eager",
        "--ds.adam_offload": "",
        "--actor.gradient_checkpointing_enable": "",
        "--data.max_len": "777",
    }
    assert {option: value(command, option) for option in expected} == expected
    check_options(command)


def test_actor_and_reference_share_gpus_by_themselves(make: Any) -> None:
    command = make(colocate="actor_ref")
    assert "--train.colocate_actor_ref" in command
    assert "--train.colocate_all" not in command


@pytest.mark.parametrize(
    ("rollouts", "gpus", "asked", "expected"),
    [((4, 2), 1, 64, 8), ((4, 2), 2, 64, 4), ((4, 3), 1, 8, 6), ((16, 8), 4, 8, 8), ((1, 7), 1, 5, 1)],
)
def test_a_micro_batch_divides_what_a_gpu_has(
    make: Any, rollouts: tuple[int, int], gpus: int, asked: int, expected: int
) -> None:
    command = make({"prompts_per_step": rollouts[0], "generations": rollouts[1]}, gpus=gpus, micro_batch=asked)
    assert value(command, "--train.micro_batch_size") == value(command, "--rollout.micro_batch_size") == str(expected)


def test_roll_outs_that_gpus_cannot_share_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="the 9 roll-outs .* among 2 data-parallel ranks"):
        make({"prompts_per_step": 3, "generations": 3}, gpus=2)


def test_a_ring_of_gpus_is_one_rank(make: Any) -> None:
    ring = ["--ds.ring_attn_size", "2", "--ds.packing_samples"]
    command = make({"prompts_per_step": 3, "generations": 3}, gpus=2, micro_batch=9, extra_args=ring)
    assert value(command, "--train.micro_batch_size") == "9"
    with pytest.raises(ConfigError, match="--ds.ring_attn_size 2 does not divide the 3 GPUs of the actor"):
        make(gpus=3, extra_args=ring)


def test_the_longest_sequence_is_what_the_model_can(make: Any, places: Places) -> None:
    (places.model / "config.json").write_text('{"max_position_embeddings": 64}')
    assert value(make({"max_new_tokens": 16}), "--data.max_len") == "64"
    with pytest.raises(ConfigError, match="64 tokens leave no room for a prompt"):
        make({"max_new_tokens": 64})


def test_lora_becomes_rank_alpha_and_modules(make: Any) -> None:
    lora = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    command = make({"lora": lora}, extra_args=["--train.max_epochs", "2"])
    assert value(command, "--ds.lora.rank") == "4"
    assert value(command, "--ds.lora.alpha") == "8"
    assert values(command, "--ds.lora.target_modules") == ["q_proj", "v_proj"]
    check_options(command)


def test_all_linear_is_left_to_openrlhf_and_a_name_is_a_list_of_one(make: Any) -> None:
    assert "--ds.lora.target_modules" not in make()
    assert values(make({"lora": {"target_modules": "q_proj"}}), "--ds.lora.target_modules") == ["q_proj"]


def test_without_lora_all_parameters_are_trained(make: Any) -> None:
    assert not any(word.startswith("--ds.lora") for word in make({"lora": None}))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"alpha": 8.5}, "alpha: OpenRLHF takes whole numbers"),
        ({"rslora": True}, "OpenRLHF has no rsLoRA"),
        ({"target_modules": ".*_proj"}, "no regular expression"),
        ({"target_modules": []}, "the list is empty"),
    ],
)
def test_an_adapter_that_openrlhf_cannot_make_is_refused(make: Any, lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make({"lora": lora})


@pytest.mark.parametrize("name", ["a,b.jsonl", "a@b.jsonl"])
def test_a_path_that_openrlhf_would_split_is_refused(make: Any, places: Places, name: str) -> None:
    with pytest.raises(ConfigError, match="for a separator; rename it"):
        make(places=replace(places, data=places.data.with_name(name)))
    reward = replace(places, reward_url=f"/rewards/{name}")
    if "," in name:
        with pytest.raises(ConfigError, match="for a separator; rename it"):
            make(places=reward)
    else:
        assert value(make(places=reward), "--reward.remote_url") == f"/rewards/{name}"


def test_further_options_come_last_so_that_they_win(make: Any) -> None:
    extra = ["--train.max_epochs", "2", "--actor.lr_warmup_ratio", "0.1", "--actor.adam.betas", "0.9", "0.999"]
    command = make(extra_args=extra)
    assert command[-len(extra) :] == extra
    assert command.index("--actor.lr_warmup_ratio") < len(command) - len(extra)
    assert make(extra_args=["--train.max_epochs", 2])[-2:] == ["--train.max_epochs", "2"]  # YAML's number is a word


def test_every_option_that_is_made_is_known_to_be_ours(make: Any, places: Places) -> None:
    full = {"lora": {"target_modules": ["q_proj"]}, "beta": 0.1}
    vllm = {"sleep": True, "eager": True, "prefix_caching": True}
    deepspeed = {"adam_offload": True, "gradient_checkpointing": True}
    segment = replace(SEGMENT, samples=16, save_hf=True, save_deepspeed=False, load=True, chat=True)
    command = make(full, segment=segment, colocate="all", vllm=vllm, deepspeed=deepspeed)
    made = {word for word in command if word.startswith("--")}
    assert made - {"--actor.lr_warmup_ratio"} == set(options.OURS)
    recorded = json.loads(options.RECORD.read_text())["options"]
    assert set(options.OURS) | set(options.REFUSED) <= set(recorded)


@pytest.mark.parametrize("option", sorted(options.OURS))
def test_what_the_run_config_sets_is_refused_beside_it(make: Any, option: str) -> None:
    record = json.loads(options.RECORD.read_text())["options"][option]
    word = {"str": "x", "int": "1", "float": "0.5"}.get(record.get("type", ""), "")
    with pytest.raises(ConfigError) as error:
        make(extra_args=[option, *([record["choices"][0]] if "choices" in record else [word] if word else [])])
    assert str(error.value) == f"backend.extra_args: {option} is set by {options.OURS[option]}"


REFUSED = [
    (["--actor.freeze_visual_encoder"], "images are not trained on"),
    (["--actor.optim", "muon"], "Adam's state"),
    (["--critic.freezing_steps", "5"], "no estimator of this backend has a critic"),
    (["--critic.model_name_or_path", "x"], "no estimator of this backend has a critic"),
    (["--data.max_images_per_prompt", "1"], "images are not trained on"),
    (["--ds.load_in_4bit"], "4 bits cannot hold"),
    (["--ds.tensor_parallel_size=2"], "use ZeRO"),
    (["--ds.use_universal_ckpt"], "cannot be read back"),
    (["--local_rank", "0"], "Ray gives each process its rank"),
    (["--reward.model_name_or_path", "x"], "rewards are verifiable"),
    (["--rollout.vllm_generate_batch_size", "4"], "no more and no less"),
    (["--data.input_template", "Q: {}"], "write it into the data"),
    (["--train.agent_func_path", "agent.py"], "in the place of training.reward"),
    (["--train.async_enable"], "weights would change while"),
    (["--train.enable_ema"], "an average"),
    (["--train.partial_rollout_enable"], "weights would change while"),
]


@pytest.mark.parametrize(("extra", "reason"), REFUSED, ids=[extra[0] for extra, _ in REFUSED])
def test_what_the_backend_cannot_drive_is_refused_with_the_reason(make: Any, extra: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        make(extra_args=extra)
    assert str(error.value).startswith(f"backend.extra_args: {extra[0].partition('=')[0]} cannot be: ")


def test_every_refusal_is_tried() -> None:
    assert set(options.REFUSED) == {extra[0].partition("=")[0] for extra, _ in REFUSED if "critic" not in extra[0]}


@pytest.mark.parametrize(
    "extra",
    [
        ["--actor.optim", "adam"],
        ["--ds.tensor_parallel_size", "1"],
        ["--data.max_images_per_prompt", "0"],
        ["--algo.dynamic_filtering_enable"],
        ["--ds.lora.dropout", "0.1"],
    ],
)
def test_what_changes_nothing_or_does_no_harm_passes(make: Any, extra: list[str]) -> None:
    assert make(extra_args=extra)[-len(extra) :] == extra


def test_filtered_prompts_cannot_be_counted_where_segments_are_counted_in_them(make: Any) -> None:
    with pytest.raises(ConfigError, match="counts steps in prompts"):
        make(jump="merge", extra_args=["--algo.dynamic_filtering_enable"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--train.max_epoch", "2"], "no option --train.max_epoch; did you mean --train.max_epochs?"),
        (["--train.max_epochs 2"], "no option --train.max_epochs 2; did you mean --train.max_epochs?"),
        (["--train.max_epochs", "two"], "argument --train.max_epochs: invalid int value: 'two'"),
        (["--train.max_epochs"], "argument --train.max_epochs: expected one argument"),
        (["--actor.adam.betas", "0.9"], "argument --actor.adam.betas: expected 2 arguments"),
        (["--actor.policy_loss_type", "grpo"], "argument --actor.policy_loss_type: invalid choice: 'grpo'"),
        (["--ds.packing_samples", "true"], "'true' belongs to no option"),
        (["--zzz"], "OpenRLHF 0.11.2 has no option --zzz"),
    ],
)
def test_a_wrong_further_option_is_named(make: Any, extra: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(extra_args=extra)
    assert str(error.value).startswith("backend.extra_args: ")
    assert message in str(error.value)


def test_a_whole_command_line_is_checked_alike(make: Any) -> None:
    with pytest.raises(ConfigError, match="OpenRLHF's command line: argument --ds.zero_stage: invalid int value"):
        check_options([*make(), "--ds.zero_stage", "x"])


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"vllm": {"sleep": True}}, "set colocate: all"),
        ({"colocate": "all", "gpus": 2}, r"nodes \* gpus = 2.* = 1"),
        ({"reward_file": "reward.txt"}, "not a .py file"),
        ({"deepspeed": {"dtype": "fp16"}}, "deepspeed.dtype"),
        ({"vllm": {"gpu_memory": 1.5}}, "vllm.gpu_memory"),
        ({"deepspeed": {"zero_stage": 4}}, "deepspeed.zero_stage"),
        ({"engine": 1}, "engine"),
    ],
)
def test_a_block_that_contradicts_itself_is_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OpenRlhfConfig.model_validate({"python": "python", **block})


def test_the_interpreter_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = OpenRlhfConfig.model_validate({"python": "~/venv/bin/python"})
    assert config.python == tmp_path / "venv/bin/python"
    with pytest.raises(ConfigError, match=r"backend\.python: .*/venv/bin/python does not exist.*openrlhf==0\.11\.2"):
        check_python(config)
    config.python.parent.mkdir(parents=True)
    config.python.write_text("#!/bin/sh\n")
    with pytest.raises(ConfigError, match="is not executable"):
        check_python(config)
    config.python.chmod(0o755)
    check_python(config)


def stand_in(tmp_path: Path, script: str) -> Path:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return python


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"version": None}, "has no OpenRLHF; this backend drives 0.11.2"),
        ({"version": "0.10.1", "refused": "x"}, "has OpenRLHF 0.10.1; this backend drives 0.11.2"),
        ({"version": "0.11.2", "refused": "argument --x"}, "OpenRLHF refuses the command line: argument --x"),
        ({"version": "0.11.2", "failed": "ImportError: no vllm"}, "does not run in the environment of .*: ImportError"),
    ],
)
def test_what_the_environment_answers_is_told(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    python = stand_in(tmp_path, f"echo noise; echo '{environment.ANSWER}{json.dumps(said)}'; echo more")
    with pytest.raises(ConfigError, match=message):
        ask_parser(python, [], {})


def test_an_interpreter_that_cannot_answer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot run OpenRLHF's parser: boom"):
        ask_parser(stand_in(tmp_path, "echo boom >&2; exit 3"), [], {})
    with pytest.raises(ConfigError, match="cannot be run"):
        ask_parser(tmp_path / "none", [], {})


def test_a_parser_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "TIMEOUT", 0.5)
    with pytest.raises(ConfigError, match="did not answer in 0.5 s"):
        ask_parser(stand_in(tmp_path, 'sleep 60 & echo $! > "$PIDFILE"; wait'), [], {"PIDFILE": str(tmp_path / "pid")})
    child = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.openrlhf
@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "reinforce++"])
def test_openrlhf_itself_takes_what_is_made(
    make: Any, places: Places, openrlhf_python: Path, openrlhf_env: dict[str, str], algorithm: str
) -> None:
    training = {"algorithm": algorithm, "beta": 0.01, "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}}
    if algorithm == "rloo":
        training["lora"] = None
    answer = ask_parser(openrlhf_python, make(training, extra_args=["--train.max_epochs", "2"]), openrlhf_env)
    assert answer["version"] == "0.11.2"
    assert set(answer["versions"]) == {"torch", "vllm", "deepspeed", "ray", "transformers", "peft"}
    args = answer["args"]
    assert args["actor"]["model_name_or_path"] == str(places.model)
    assert args["algo"]["kl"]["use_loss"] is (algorithm == "grpo")
    assert args["train"]["batch_size"] == args["rollout"]["batch_size"] * args["rollout"]["n_samples_per_prompt"]
    assert args["train"]["max_epochs"] == 2
    assert args["reward"]["remote_url"] == [places.reward_url]
    assert args["critic"]["model_name_or_path"] is None
    lora = args["ds"]["lora"]
    expected = (0, "all-linear") if algorithm == "rloo" else (4, ["q_proj", "v_proj"])
    assert (lora["rank"], lora["target_modules"]) == expected
    assert math.isclose(args["actor"]["adam"]["lr"], 1e-5)


@pytest.mark.openrlhf
def test_openrlhfs_own_refusals_are_told(make: Any, openrlhf_python: Path, openrlhf_env: dict[str, str]) -> None:
    contradiction = ["--algo.dynamic_filtering_enable", "--algo.dynamic_filtering_range", "1", "0"]
    with pytest.raises(ConfigError, match=r"OpenRLHF refuses the command line: reward_clip_range\[0\] must be less"):
        ask_parser(openrlhf_python, make(extra_args=contradiction), openrlhf_env)
    with pytest.raises(ConfigError, match="OpenRLHF refuses the command line: unrecognized arguments: --zzz"):
        ask_parser(openrlhf_python, ["--zzz"], openrlhf_env)


@pytest.mark.openrlhf
def test_the_recorded_options_are_openrlhfs(
    tmp_path: Path, openrlhf_python: Path, openrlhf_env: dict[str, str]
) -> None:
    record = tmp_path / "options.json"
    command: list[str | Path] = [openrlhf_python, environment.PARSE, "--record", record]
    subprocess.run(command, env={**os.environ, **openrlhf_env}, check=True, capture_output=True, timeout=300)
    assert record.read_text() == options.RECORD.read_text()

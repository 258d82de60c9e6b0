"""The block `backend: {name: openrlhf, ...}` of a run config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from next_core.settings import Settings


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()  # links are kept: a virtual environment's python is one


FilePath = Annotated[Path, AfterValidator(_absolute)]


class VllmSettings(Settings):
    """The engines that generate the roll-outs."""

    engines: int = Field(1, ge=1, description="vLLM engines")
    tensor_parallel: int = Field(1, ge=1, description="GPUs of each engine")
    gpu_memory: float = Field(0.9, gt=0, le=1, description="Share of a GPU's memory that an engine takes")
    sync: Literal["nccl", "gloo"] = Field("nccl", description="How new weights reach the engines")
    eager: bool = Field(False, description="No CUDA graphs: a quicker start, slower roll-outs")
    prefix_caching: bool = Field(False, description="Keep the key-value cache of prompts that begin alike")
    sleep: bool = Field(False, description="Free an engine's memory while the actor trains; with `colocate: all`")


class DeepSpeedSettings(Settings):
    """How the actor is trained."""

    zero_stage: int = Field(2, ge=1, le=3, description="What ZeRO shards: optimizer (1), gradients (2), weights (3)")
    dtype: Literal["bf16"] = Field(
        "bf16", description="Precision beside the fp32 masters; OpenRLHF's vLLM engines take weights in bf16 only"
    )
    attention: str = Field("flash_attention_2", description="Attention, as transformers names it")
    adam_offload: bool = Field(False, description="Keep the optimizer in the CPU's memory")
    gradient_checkpointing: bool = Field(False, description="Compute activations again in the backward pass")


class RaySettings(Settings):
    """The Ray cluster that the trainer runs in."""

    address: str | None = Field(None, description="A running cluster, as ray.init takes it; none: start a local one")
    num_gpus: int | None = Field(None, ge=0, description="GPUs that a local Ray is told it has; none: those it finds")
    num_cpus: int | None = Field(None, ge=1, description="CPUs that a local Ray is told it has; none: those it finds")
    object_store_mib: int | None = Field(None, ge=80, description="Object store of a local Ray; none: Ray's default")


class OpenRlhfConfig(Settings):
    """OpenRLHF, run in an environment of its own."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    python: FilePath = Field(
        description="Interpreter of the environment that OpenRLHF is installed in; from the working directory"
    )
    jump: Literal["swap", "restart", "merge"] = Field(
        "swap",
        description="How training goes on from a jump: new weights in the running trainer, a new trainer that takes "
        "them up, or a new trainer on a merged model",
    )
    estimator: Literal["group_norm", "dr_grpo", "rloo", "reinforce_baseline", "reinforce"] | None = Field(
        None, description="Advantage estimator; none: the one of training.algorithm"
    )
    reward_file: FilePath | None = Field(
        None, description="Python file with OpenRLHF's reward_func(queries, prompts, labels), for training.reward"
    )
    gpus: int = Field(1, ge=1, description="GPUs per node of the actor, and of the reference model")
    nodes: int = Field(1, ge=1, description="Nodes of the actor, and of the reference model")
    colocate: Literal["none", "actor_ref", "all"] = Field(
        "none", description="Models that share GPUs: none, actor and reference, or these and the engines"
    )
    vllm: VllmSettings = VllmSettings()
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    micro_batch: int = Field(
        8, ge=1, description="Most roll-outs of a GPU in one pass; lowered to a divisor of those it has in a step"
    )
    max_length: int | None = Field(
        None, ge=2, description="Longest prompt and completion in tokens; none: 1024 + max_new_tokens, if the model can"
    )
    ray: RaySettings = RaySettings()
    env: dict[str, str] = Field(default_factory=dict, description="Further environment of the trainer and its workers")
    save_hf: bool = Field(False, description="Also save models as OpenRLHF does (global_stepN_hf), at save_every")
    keep_hf: int = Field(2, ge=1, description="How many of these to keep")
    masters: bool = Field(
        True, description="With `jump: merge`: save DeepSpeed's states and take the fp32 masters from them"
    )
    max_vllm_kl: float | None = Field(
        0.03,
        gt=0,
        description="Most divergence of engines and actor in the first step after new weights, where the trainer logs "
        "vllm_kl",
    )
    extra_args: list[str] = Field(
        default_factory=list, description="Further options of OpenRLHF, as on its command line; one item a word"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.reward_file is not None and self.reward_file.suffix != ".py":
            raise ValueError(f"reward_file: {self.reward_file} is not a .py file, which is what OpenRLHF loads")
        if self.vllm.sleep and self.colocate != "all":
            raise ValueError("vllm.sleep: engines sleep only where they share GPUs with the actor; set colocate: all")
        actor, engines = self.nodes * self.gpus, self.vllm.engines * self.vllm.tensor_parallel
        if self.colocate == "all" and actor != engines:
            raise ValueError(
                f"colocate: all needs as many GPUs of the actor (nodes * gpus = {actor}) as of the engines "
                f"(vllm.engines * vllm.tensor_parallel = {engines})"
            )
        return self


__all__ = ["DeepSpeedSettings", "OpenRlhfConfig", "RaySettings", "VllmSettings"]

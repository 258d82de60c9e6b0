"""The block `backend: {name: openrlhf, ...}` of a run config."""

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from next_backends.external.external_config import FilePath, RaySettings
from next_core.settings import Settings


class VllmSettings(Settings):
    """The engines that generate rollouts."""

    engines: int = Field(1, ge=1, description="Number of vLLM engines")
    tensor_parallel: int = Field(1, ge=1, description="GPUs per engine")
    gpu_memory: float = Field(0.9, gt=0, le=1, description="Share of a GPU's memory for an engine")
    sync: Literal["nccl", "gloo"] = Field("nccl", description="How new weights reach the engines")
    eager: bool = Field(False, description="No CUDA graphs: starts faster, generates slower")
    prefix_caching: bool = Field(False, description="Keep the key-value cache of common prompt prefixes")
    sleep: bool = Field(False, description="Free an engine's memory while the actor trains; needs `colocate: all`")


class DeepSpeedSettings(Settings):
    """How the actor is trained."""

    zero_stage: int = Field(2, ge=1, le=3, description="What ZeRO shards: optimizer (1), gradients (2), weights (3)")
    dtype: Literal["bf16"] = Field(
        "bf16", description="Precision next to the fp32 masters; OpenRLHF's vLLM engines take bf16 weights only"
    )
    attention: str = Field("flash_attention_2", description="Attention, as transformers names it")
    adam_offload: bool = Field(False, description="Keep the optimizer in CPU memory")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass")


class OpenRlhfConfig(Settings):
    """OpenRLHF in an environment of its own."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    python: FilePath = Field(
        description="Interpreter of the environment with OpenRLHF, relative to the working directory"
    )
    jump: Literal["swap", "restart"] = Field(
        "swap",
        description="How training continues from a jump: new weights in the running trainer, or a new trainer that "
        "loads them",
    )
    estimator: Literal["group_norm", "dr_grpo", "rloo", "reinforce_baseline", "reinforce"] | None = Field(
        None, description="Advantage estimator; none: the default of training.algorithm"
    )
    reward_file: FilePath | None = Field(
        None, description="Python file with OpenRLHF's reward_func(queries, prompts, labels); replaces training.reward"
    )
    gpus: int = Field(1, ge=1, description="GPUs for the actor, and for the reference model")
    colocate: Literal["none", "actor_ref", "all"] = Field(
        "none", description="Models that share GPUs: none, actor and reference, or these and the engines"
    )
    vllm: VllmSettings = VllmSettings()
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    micro_batch: int = Field(
        8, ge=1, description="Maximum rollouts of a GPU in one pass; lowered to a divisor of its rollouts in a step"
    )
    max_length: int | None = Field(
        None, ge=2, description="Maximum tokens of prompt and completion; none: 1024 + max_new_tokens, if the model can"
    )
    ray: RaySettings = RaySettings()
    env: dict[str, str] = Field(default_factory=dict, description="Environment variables of the trainer's processes")
    save_hf: bool = Field(False, description="Also save models as OpenRLHF does (global_stepN_hf), at save_every")
    keep_hf: int = Field(2, ge=1, description="How many of these to keep")
    max_vllm_kl: float | None = Field(
        0.03,
        gt=0,
        description="Bound on vllm_kl, the divergence of engines and actor, in the first step after new weights; "
        "checked if the trainer logs it",
    )
    extra_args: list[str] = Field(
        default_factory=list, description="Other OpenRLHF options, as on its command line; one item per word"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.reward_file is not None and self.reward_file.suffix != ".py":
            raise ValueError(f"reward_file: {self.reward_file} is not a .py file, which OpenRLHF needs")
        if self.vllm.sleep and self.colocate != "all":
            raise ValueError("vllm.sleep: engines sleep only if they share GPUs with the actor; set colocate: all")
        engines = self.vllm.engines * self.vllm.tensor_parallel
        if self.colocate == "all" and self.gpus != engines:
            raise ValueError(
                f"colocate: all needs as many GPUs of the actor (gpus = {self.gpus}) as of the engines "
                f"(vllm.engines * vllm.tensor_parallel = {engines})"
            )
        return self

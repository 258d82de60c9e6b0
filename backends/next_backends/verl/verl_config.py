"""The block `backend: {name: verl, ...}` of a run config."""

from typing import Literal

from pydantic import ConfigDict, Field

from next_backends.external.external_config import FilePath, RaySettings
from next_core.settings import Settings


class EngineSettings(Settings):
    """The vLLM engines that generate rollouts, on the actor's GPUs."""

    tensor_parallel: int = Field(1, ge=1, description="GPUs per engine")
    gpu_memory: float = Field(0.5, gt=0, le=1, description="Share of a GPU's memory for an engine")
    eager: bool = Field(False, description="No CUDA graphs: starts faster, generates slower")


class FsdpSettings(Settings):
    """How the actor is trained: FSDP2, with fp32 weights."""

    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Precision of forward and backward passes")
    offload: bool = Field(False, description="Keep weights and optimizer in CPU memory while engines generate")
    gradient_checkpointing: bool = Field(True, description="Recompute activations in the backward pass")
    attention: str = Field("flash_attention_2", description="Attention, as transformers names it")
    remove_padding: bool = Field(True, description="Pack sequences; needs flash_attention_2")


class VerlConfig(Settings):
    """verl in an environment of its own."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    python: FilePath = Field(description="Interpreter of the environment with verl, relative to the working directory")
    estimator: Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline", "reinforce_plus_plus"] | None = Field(
        None, description="Advantage estimator; none: the default of training.algorithm"
    )
    gpus: int = Field(1, ge=1, description="GPUs, which actor and engines share")
    vllm: EngineSettings = EngineSettings()
    fsdp: FsdpSettings = FsdpSettings()
    micro_batch: int = Field(8, ge=1, description="Rollouts of a GPU in one pass; lowered to a divisor")
    max_prompt: int = Field(1024, ge=1, description="Longest prompt in tokens; longer ones are left out")
    ray: RaySettings = RaySettings()
    env: dict[str, str] = Field(default_factory=dict, description="Environment variables of verl's processes")
    overrides: list[str] = Field(
        default_factory=list,
        description="Other settings as Hydra overrides, such as actor_rollout_ref.actor.clip_ratio=0.3",
    )

"""The engine's own plug-ins, registered exactly as a stranger's are."""

from next_core.hookspecs import Register, hookimpl


@hookimpl
def register_compressors(register: Register) -> None:
    register("next_core.compressors.exact:ExactCompressor", name="exact")
    register("next_core.compressors.lanczos:LanczosCompressor", name="lanczos")


@hookimpl
def register_sources(register: Register) -> None:
    register("next_core.sources.memory:MemorySource", name="memory")
    register("next_core.sources.adapter_source:PeftAdapterSource", name="peft-adapter")
    register("next_core.sources.full_model:FullModelSource", name="full-model")


@hookimpl
def register_appliers(register: Register) -> None:
    register("next_core.live_weights.in_memory:InMemoryApplier", name="in-memory")
    register("next_core.appliers.adapter_applier:PeftAdapterApplier", name="peft-adapter")
    register("next_core.appliers.merged_model:MergedModelApplier", name="merged-model")
    register("next_core.appliers.verl_applier:VerlApplier", name="verl")


@hookimpl
def register_rewards(register: Register) -> None:
    register("next_core.rewards:MathVerifyReward", name="math-verify")

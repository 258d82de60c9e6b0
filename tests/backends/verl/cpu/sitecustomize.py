"""TEST-ONLY: lets the real verl train on a CPU. With this folder on PYTHONPATH every Python of a run reads it.

No file of verl or vLLM is changed, and nothing here has to do with how next-core drives the trainer.
"""

from typing import Any

from wrapt import when_imported  # type: ignore[import-not-found]


@when_imported("vllm.model_executor.layers.utils")
def weights_stay_writable(layers: Any) -> None:
    """On a CPU vLLM repacks each matrix and drops the original, so that no new weights could be loaded into it."""

    def keep(layer: Any, remove_weight: bool) -> None:
        from torch.nn import functional

        layer.cpu_linear = functional.linear

    layers.dispatch_cpu_unquantized_gemm = keep


@when_imported("vllm.model_executor.models.utils")
def name_of_older_releases(utils: Any) -> None:
    """vLLM 0.32 has another name for what verl 0.9.1 calls."""
    mapper = utils.WeightsMapper
    if not hasattr(mapper, "get_unstacked_mapper"):
        mapper.get_unstacked_mapper = mapper.get_rename_mapper

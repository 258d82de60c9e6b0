"""Trained weights that are sharded over processes: DeepSpeed ZeRO-1, 2 and 3, and PyTorch's FSDP2."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from next_core.errors import unsupported
from next_core.live_weights.kept_state import local
from next_core.live_weights.processes import Processes
from next_core.live_weights.trained_weights import Shard, TrainedWeights, WholeWeights


def trained_weights(model: nn.Module, optimizer: Any, processes: Processes | None) -> TrainedWeights:
    """Return access to a model's trained weights, by how ``optimizer`` and model are sharded. Raises ``BackendError``.

    ``optimizer`` may be wrapped by accelerate.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if type(inner).__module__.startswith("deepspeed"):
        return ZeroWeights(model, inner)
    if sharded_by_dtensor(model):
        return Fsdp2Weights(model, inner)
    return WholeWeights(model, inner, processes)


def sharded_by_dtensor(model: nn.Module) -> bool:
    """Whether a parameter is a DTensor. Raises ``BackendError`` unless FSDP2 alone has sharded it."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    sharded = [(name, p) for name, p in model.named_parameters() if isinstance(p, DTensor)]
    if not sharded:
        return False
    name, parameter = sharded[0]
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise unsupported(
            f"'{name}' is sharded over the processes, but not by FSDP2; load the model without tp_plan or device mesh"
        )
    if parameter.device_mesh.ndim > 1:
        raise unsupported(
            f"'{name}' is sharded over a device mesh of {parameter.device_mesh.ndim} dimensions; use FSDP2 over all "
            "processes, without replicas, tensor or context parallelism"
        )
    return True


class Fsdp2Weights(TrainedWeights):
    """Parameters are DTensors and the optimizer steps on them: each process has a part of each."""

    forward_needs_all = True

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        from torch.distributed.fsdp import FSDPModule

        super().__init__(model, optimizer)
        groups = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        trained = [p for p in self.parameters.values() if id(p) in groups]
        self._groups = sorted(((groups[id(p)], p) for p in trained), key=lambda item: item[0])
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]

    @property
    def shards(self) -> Sequence[Shard]:
        self._reshard()
        return [Shard(local(p.detach()), p, group) for group, p in self._groups]

    def read(self, name: str) -> Tensor:
        self._reshard()
        parameter: Any = self.parameters[name].detach()
        whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        return whole

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        from torch.distributed.tensor import distribute_tensor

        self._reshard()
        for name, value in values.items():
            parameter: Any = self.parameters[name]
            whole = value.to(parameter.device, parameter.dtype)
            if hasattr(parameter, "placements"):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(whole)

    def publish(self, moments: bool = False) -> None:
        """Nothing is copied: the next forward pass gathers the shards."""

    def after_evaluation(self) -> None:
        self._reshard()

    def _reshard(self) -> None:
        """Shard the root again, which a forward pass leaves gathered: the next one would use old weights."""
        for module in self._modules:
            module.reshard()


_STAGES_1_AND_2 = ("single_partition_of_fp32_groups", "update_lp_params")
_STAGE_3 = (
    *("fp32_partitioned_groups_flat", "sub_group_to_group_id", "persistent_parameters", "invalidate_secondary_tensor"),
    *("_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters"),
    *("_get_fp32_opt_state_partition", "_get_param_partition_rank"),
)
_REACHED = {"DeepSpeedZeroOptimizer": _STAGES_1_AND_2, "DeepSpeedZeroOptimizer_Stage3": _STAGE_3}
"""What we use of DeepSpeed's optimizers. Those derived from them (ZenFlow, SuperOffload, MiCS) step in other ways."""


class ZeroWeights(TrainedWeights):
    """The optimizer steps on flat fp32 masters, of which each process has a part; the model holds rounded copies."""

    resumes_adapters = False

    def __init__(self, model: nn.Module, zero: Any) -> None:
        super().__init__(model, getattr(zero, "optimizer", None))
        self._zero = zero
        name = type(zero).__name__
        missing = [part for part in _REACHED.get(name, ("known masters",)) if not hasattr(zero, part)]
        if missing:
            raise unsupported(
                f"DeepSpeed trains with {name}, which has no {missing[0]}; use plain ZeRO stage 1, 2 or 3 of version "
                "0.19"
            )
        self._third = _REACHED[name] is _STAGE_3
        self.forward_needs_all = self._third
        on_disk = any(getattr(zero, part, False) for part in ("swap_optimizer", "params_in_nvme_and_cpu"))
        if on_disk or getattr(zero, "partial_offload", 1.0) not in (0.0, 1.0):
            raise unsupported(
                "DeepSpeed keeps a part of the weights or moments on NVMe, or the optimizer partly on the CPU "
                "(`ratio`); offload to the CPU as a whole or not at all"
            )

    @property
    def shards(self) -> Sequence[Shard]:
        if self._third:
            groups = self._zero.sub_group_to_group_id
            flat = self._zero.fp32_partitioned_groups_flat
            return [Shard(tensor.detach(), tensor, groups[index]) for index, tensor in enumerate(flat)]
        flat = self._zero.single_partition_of_fp32_groups
        return [Shard(tensor.detach(), tensor, index) for index, tensor in enumerate(flat)]

    def read(self, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        found: Tensor = safe_get_full_fp32_param(self.parameters[name])
        return found.detach()

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        for name, value in values.items():
            parameter: Any = self.parameters[name]
            if self._third:  # DeepSpeed's own function fails where the processes' equal parts are padded
                rank, size = self._zero._get_param_partition_rank(parameter), parameter.partition_numel()
                part = value.flatten()[rank * size : (rank + 1) * size]
                self._zero._get_fp32_opt_state_partition(parameter, True)[0][: len(part)].copy_(part)
            else:
                safe_set_full_fp32_param(parameter, value.to(parameter.device))
        self.publish()

    @torch.no_grad()
    def publish(self, moments: bool = False) -> None:
        """Round the masters into the model as DeepSpeed does after a step of its own."""
        zero = self._zero
        if not self._third:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for index in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()

    def adapters_changed(self) -> None:
        if self._third:
            from deepspeed.runtime.zero.parameter_offload import _init_external_params

            for module in self.model.modules():
                if not hasattr(module, "ds_external_parameters"):
                    _init_external_params(module)

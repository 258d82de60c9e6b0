"""A live optimizer's steps: multiplied, compared by a sample of coordinates, averaged, and undone after a collapse."""

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from next_core.errors import describe, no_history, unsupported
from next_core.interfaces import Applied
from next_core.interfaces.trainer_steps import MeanApplied, TrainerSteps
from next_core.live_weights.kept_state import check_state, local
from next_core.live_weights.kept_states import KeptStates
from next_core.live_weights.live_model import kept_file
from next_core.live_weights.processes import Processes, everywhere
from next_core.live_weights.trained_weights import TrainedWeights
from next_core.storage.atomic import disk_operation

SAMPLE = 16_384
"""Coordinates in the sample: a cosine of two motions over it has a standard error of at most 1 / sqrt(16384) = .008."""
SMALL = 8_192
"""Elements of a tensor up to which it is handled together with others: a call for each takes longer than a copy."""
BLOCKS = 4  # Blocks whose motions can be compared


class OptimizerSteps(TrainerSteps):
    """Follows a ``torch.optim`` optimizer and multiplies its learning rates around each step, unseen by a scheduler.

    Motions are compared free of the rate and of momentum. With w_t a fixed random sample of the weights after step t
    and eta_t the rate that step used, u_t = (1 - b^t) (w_t - w_{t-1}) / eta_t is Adam's first moment, preconditioned
    (b = beta_1; the factor undoes its bias correction), and e_t = (u_t - b u_{t-1}) / (1 - b) is what the gradient of
    step t brought to it. With momentum, motions of a run without any signal agree: by .5 over 10 steps.

    Where weights are sharded, each process samples as many, averages and keeps its own shards, and only inner products
    are summed over processes. Methods marked ``everywhere`` are called in process 0; ``after_step`` in every process.

    Memory: eight vectors of the sample; the trained weights once for each window, on their device; and on the CPU the
    weights with the optimizer's moments, until they are written to ``folder``.
    """

    def __init__(
        self,
        weights: TrainedWeights,
        folder: Path,
        windows: Sequence[int] = (),
        processes: Processes | None = None,
    ) -> None:
        self._trained, self.processes = weights, processes
        self._optimizer = weights.optimizer
        reason = why_not(self._optimizer)
        if reason is not None:
            raise unsupported(
                f"{type(self._optimizer).__name__} {reason}, and its steps cannot be scaled; choose AdamW, or a "
                "predictor that jumps, such as 'adaptive-secant'"
            )
        shards = weights.shards
        places = sample_indices([shard.tensor.numel() for shard in shards], SAMPLE)
        counted = [torch.full_like(indices, shard.group) for shard, indices in zip(shards, places, strict=True)]
        self._group = torch.cat(counted) if counted else torch.zeros(0, dtype=torch.long)
        self._packs = packs_of([shard.tensor for shard in shards])
        self._places = []
        for pack in self._packs:
            starts = accumulate((shard.tensor.numel() for shard in shards[pack]), initial=0)
            moved = [indices + start for indices, start in zip(places[pack], starts, strict=False)]
            self._places.append(torch.cat(moved).to(shards[pack][0].tensor.device))
        self._means = {window: self._copies() for window in windows}
        self._before_mean: list[Tensor] = []
        self._averaged = 0
        self._states = KeptStates(weights, folder, self._rank)
        self._updates = 0
        self._blocks: deque[Tensor] = deque(maxlen=BLOCKS)
        self._weights = self._motion = torch.zeros(0)
        self._update: Tensor | None = None
        self._restart_motions()
        self._groups = list(self._optimizer.param_groups)
        self._scheduled = [float(group["lr"]) for group in self._groups]
        self._used = list(self._scheduled)
        self._stepped, self._coasting = False, True
        self._depth = 0
        """How many calls of ``step`` are under way: a subclass may call its parent's, and each calls the hooks."""
        self._rates: list[tuple[dict[str, Any], Any]] = []
        """The groups whose rates are multiplied now, with the scheduler's."""
        for hook in list(self._optimizer._optimizer_step_pre_hooks.values()):
            if isinstance(earlier := getattr(hook, "__self__", None), OptimizerSteps):
                earlier.close()  # of a training that failed
        self._hooks = (
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        )
        if processes is not None:
            processes.register(self)

    def close(self) -> None:
        """Leave the optimizer as it was."""
        for hook in self._hooks:
            hook.remove()
        self._restore_rates()  # which an error within a step left multiplied
        self._states.close()

    def _before_step(self, *_: Any) -> None:
        """Multiply the rates. DeepSpeed steps one group or one part of a group at a time."""
        self._depth += 1
        if self._depth > 1:
            return
        now = self._optimizer.param_groups
        if not all(any(group is known for known in self._groups) for group in now):
            self._groups = list(now)  # the optimizer has loaded a state
        places = {id(group): index for index, group in enumerate(self._groups)}
        for group in now:
            index = places[id(group)]
            self._scheduled[index] = float(group["lr"])
            self._rates.append((group, group["lr"]))
            group["lr"] = group["lr"] * self.multiple
            self._used[index] = float(group["lr"])
            gradients = (local(p.grad) for p in group["params"] if p.grad is not None)
            self._coasting = self._coasting and not any(bool(gradient.any()) for gradient in gradients)

    def _after_step(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        self._restore_rates()
        # A fused optimizer is called at a gradient that overflowed in fp16, too, and skips it by itself.
        skipped = getattr(self._optimizer, "found_inf", None)
        self._stepped = skipped is None or not bool(skipped)

    def _restore_rates(self) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates.clear()

    @property
    def learning_rate(self) -> float:
        return float(self._scheduled[0])

    @torch.no_grad()
    def after_step(self) -> None:
        self._averaged += 1
        weights = self._packed()
        for window, mean in self._means.items():
            # Weights that decay at this rate have the mean age of a plain mean over the window, (window - 1) / 2 steps;
            # until there are so many steps, it is the mean of them all.
            _foreach(torch._foreach_lerp_, mean, weights, max(2.0 / (window + 1), 1.0 / self._averaged))
        coasting, self._coasting = self._coasting, True
        if not self._stepped:  # fp16: a gradient that overflowed is skipped
            return
        self._stepped = False
        self._updates += 1
        if self._updates == 1:
            check_state(self._trained)
        momentum, corrected = self._momentum()
        now, before, last = self._sample(weights), self._weights, self._update
        # A scheduler's warm-up begins at a rate of zero, and such a step moves nothing.
        if len(set(self._used)) == 1 and self._used[0] > 0:
            update = (now - before) / torch.tensor(self._used[0])
        else:
            rates = torch.tensor(self._used)[self._group]
            update = torch.where(rates > 0, (now - before) / rates, 0.0)
        if corrected:
            update *= 1 - momentum**self._updates
        # Where all roll-outs of a step earn the same there is no gradient, and Adam coasts: what its decaying moments
        # leave here would always point ahead.
        if last is not None and not coasting:
            self._motion += (update - momentum * last) / (1 - momentum)
        self._weights, self._update = now, update

    @everywhere
    def end_block(self) -> None:
        self._blocks.append(self._motion)
        self._motion = torch.zeros_like(self._motion)

    @everywhere
    def products(self) -> Tensor:
        if not self._blocks:
            return torch.zeros(0, 0).double()
        blocks = torch.stack(list(self._blocks)).double()
        mine = blocks @ blocks.T
        return mine if self.processes is None else self.processes.total(mine)

    def keep(self, step: int) -> None:
        self._keep(step, self._states.in_checkpoints())

    @everywhere
    def _keep(self, step: int, in_checkpoints: Collection[int]) -> None:
        self._states.keep(step, self._updates)
        self._states.prune(in_checkpoints)

    @property
    def kept(self) -> Sequence[int]:
        return self._states.steps

    def replace_lost(self, step: int) -> str | None:
        """Forget the states of a run resumed at ``step`` whose files some process lacks; keep the present one if it is
        left with none. Returns a note of what was lost.
        """
        lost = self._drop_lost()
        if not self.kept:
            self.keep(step)
        if not lost:
            return None
        return (
            f"resumed at step {step}: the weights of step {' and '.join(map(str, lost))}, to return to after a "
            f"collapse, were deleted when a later checkpoint was complete; a collapse is undone to step "
            f"{self.kept[-1]} instead"
        )

    @everywhere
    def _drop_lost(self) -> list[int]:
        lost = self._states.lost()
        if self.processes is not None:
            lost = sorted({step for theirs in self.processes.gather(lost) for step in theirs})
        self._states.drop(lost)
        return lost

    def undo(self, step: int) -> None:
        self._recall(step)  # a file that one process lacks has to be found before all of them communicate
        self._restore()

    @everywhere
    def _recall(self, step: int) -> None:
        self._states.recall(step)

    @everywhere
    def _restore(self) -> None:
        self._updates = self._states.restore()
        self._restart_motions()
        if self._updates:
            self._update = None  # the moments hold earlier gradients: the first update tells no new one from them
        self._averaged = 0
        for mean in self._means.values():
            _foreach(torch._foreach_copy_, mean, self._packed())

    def apply_mean(self, window: int) -> Applied:
        self._copy()  # where memory does not suffice, no process must have changed its weights
        self._replace(window)
        return MeanApplied(self)

    @everywhere
    def _copy(self) -> None:
        self._before_mean = self._copies()

    @everywhere
    def _replace(self, window: int) -> None:
        self._write(self._means[window])

    @everywhere
    def replace_back(self) -> None:
        self._write(self._before_mean)
        self._before_mean = []

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        tensors = self._tensors()
        for pack, value in zip(self._packs, values, strict=True):
            parts = torch.split(value, [tensor.numel() for tensor in tensors[pack]])
            for tensor, part in zip(tensors[pack], parts, strict=True):
                tensor.copy_(part.view(tensor.shape))
        self._trained.publish()
        self._weights = self._sample(values)  # what was written here is no motion of a run that is trained further

    def _tensors(self) -> list[Tensor]:
        return [shard.tensor.detach() for shard in self._trained.shards]

    def _packed(self) -> list[Tensor]:
        """Return the weights as vectors, small ones together in a copy."""
        flat = [tensor.flatten() for tensor in self._tensors()]
        return [torch.cat(flat[pack]) if pack.stop - pack.start > 1 else flat[pack.start] for pack in self._packs]

    def _copies(self) -> list[Tensor]:
        return [vector.clone() for vector in self._packed()]

    @everywhere
    def save(self, folder: Path) -> None:
        """Write what a resumed run needs to end as the uninterrupted one does. Raises ``StorageError``."""
        tensors = {"multiple": torch.tensor([self.multiple, self._updates, self._averaged], dtype=torch.float64)}
        tensors |= {"sizes": self._sizes(), "weights": self._weights, "motion": self._motion}
        tensors |= {} if self._update is None else {"update": self._update}
        tensors |= {f"block/{index}": block for index, block in enumerate(self._blocks)}
        for window, mean in self._means.items():
            tensors |= {f"mean/{window}/{index}": value for index, value in enumerate(mean)}
        tensors |= dict(self._states.tensors())
        file = self._file(folder)
        with disk_operation("writing the state of step scaling to", file):
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file)
        self._states.saved(folder)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote. Raises ``CheckpointError`` where the file is missing or does not fit."""
        file = self._file(folder)
        try:
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            multiple, updates, averaged = tensors["multiple"].tolist()
            self.multiple, self._updates, self._averaged = multiple, int(updates), int(averaged)
            if not torch.equal(tensors["sizes"], self._sizes()):
                raise ValueError(f"it is of {tensors['sizes'].sum()} weights, not {self._sizes().sum()}")  # noqa: TRY301
            self._weights, self._motion, self._update = tensors["weights"], tensors["motion"], tensors.get("update")
            self._blocks.extend(tensors[f"block/{index}"] for index in range(BLOCKS) if f"block/{index}" in tensors)
            for window, mean in self._means.items():
                for index, value in enumerate(mean):
                    value.copy_(tensors[f"mean/{window}/{index}"])
            self._states.load(tensors, folder)
            if self._momentum()[0] > 0 and not any(self._trained.state(shard) for shard in self._trained.shards):
                self._updates, self._update = 0, torch.zeros_like(self._weights)  # saved without the optimizer
        except Exception as error:
            raise no_history(
                f"{file} does not hold the state of step scaling for this model and these processes "
                f"({describe(error)}); resume from another checkpoint, with as many processes, or start again"
            ) from error

    def _sizes(self) -> Tensor:
        """Return how many weights each of this process's shards has."""
        return torch.tensor([shard.tensor.numel() for shard in self._trained.shards])

    def _file(self, folder: Path) -> Path:
        return kept_file(folder, self._rank, "next-core")

    @property
    def _rank(self) -> int:
        return 0 if self.processes is None else self.processes.index

    def _restart_motions(self) -> None:
        self._weights = self._sample(self._packed())
        self._update, self._motion = torch.zeros_like(self._weights), torch.zeros_like(self._weights)
        self._blocks.clear()

    def _momentum(self) -> tuple[float, bool]:
        """Return the coefficient of the first moment, and whether the optimizer corrects its bias, as Adam does."""
        group = self._optimizer.param_groups[0]
        return (float(group["betas"][0]), True) if "betas" in group else (float(group.get("momentum", 0.0)), False)

    @torch.no_grad()
    def _sample(self, weights: Sequence[Tensor]) -> Tensor:
        parts = [vector.index_select(0, at) for vector, at in zip(weights, self._places, strict=True)]
        return torch.cat(parts).float().cpu() if parts else torch.zeros(0)


def why_not(optimizer: Any) -> str | None:
    """Return why the steps of an optimizer are not in proportion to its learning rate; None where they are."""
    step = getattr(type(optimizer), "step", None)
    if not getattr(step, "hooked", False):  # set by torch.optim.Optimizer's constructor
        return "is not one of torch.optim's kind"
    if hasattr(optimizer, "fused_backward"):
        return "steps while gradients are computed"
    # Schedule-free optimizers train at other weights than they return. Prodigy, D-Adaptation and Adafactor bound or set
    # their rate themselves.
    own = isinstance(optimizer, torch.optim.Rprop | torch.optim.ASGD | torch.optim.LBFGS) or hasattr(optimizer, "eval")
    if own or "d" in optimizer.param_groups[0] or optimizer.param_groups[0]["lr"] is None:
        return "has rates of its own"
    return None


def _foreach(act: Callable[..., Any], tensors: list[Tensor], *arguments: Any) -> None:
    """Call a torch function for lists of tensors, unless this process has none."""
    if tensors:
        act(tensors, *arguments)


def packs_of(tensors: Sequence[Tensor]) -> list[slice]:
    """Return runs of neighbours to handle together: small tensors of one device and precision."""
    packs: list[slice] = []
    for index, tensor in enumerate(tensors):
        first = tensors[packs[-1].start] if packs else tensor
        alike = (first.device, first.dtype) == (tensor.device, tensor.dtype)
        if packs and alike and max(first.numel(), tensor.numel()) <= SMALL:
            packs[-1] = slice(packs[-1].start, index + 1)
        else:
            packs.append(slice(index, index + 1))
    return packs


def sample_indices(sizes: Sequence[int], count: int) -> list[Tensor]:
    """Return about ``count`` places in tensors of these sizes, in proportion to them; the same in every process."""
    generator, whole = torch.Generator().manual_seed(0), max(1, sum(sizes))
    counts = [math.ceil(count * size / whole) for size in sizes]
    return [torch.randint(max(1, size), (n,), generator=generator) for size, n in zip(sizes, counts, strict=True)]

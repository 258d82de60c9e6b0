"""Write the fp32 masters of a DeepSpeed checkpoint as one safetensors file: ``masters.py STATE_FOLDER FILE``.

DeepSpeed's own reader unpickles without restriction: a checkpoint is trusted as the trainer is that wrote it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file


def main() -> None:
    state, target = Path(sys.argv[1]), Path(sys.argv[2])
    found = get_fp32_state_dict_from_zero_checkpoint(str(state.parent), tag=state.name, exclude_frozen_parameters=True)
    seen: set[int] = set()
    tensors = {}
    for name, value in found.items():
        if value.data_ptr() not in seen:  # tied weights are written once
            seen.add(value.data_ptr())
            tensors[name] = value.float().contiguous()
    save_file(tensors, target, metadata={"format": "pt"})


if __name__ == "__main__":
    main()

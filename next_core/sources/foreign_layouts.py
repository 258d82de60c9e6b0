"""Checkpoints of trainers that are not read: what they are, and what turns them into ones that are."""

from __future__ import annotations

from pathlib import Path

DEEPEST = 4
"""How many folders below one the files are looked for."""
FOREIGN = {
    "dist_ckpt": "Megatron's shards: convert each with verl, python -m verl.model_merger merge --backend megatron "
    "--local_dir {above} --target_dir FOLDER, or save hf_model too (checkpoint.save_contents) and list its folders",
    "*_model_states.pt": "DeepSpeed's states alone: convert each, python zero_to_fp32.py {above} FOLDER "
    "--safe_serialization (the script lies there), or save with stage3_gather_16bit_weights_on_model_save",
    "pytorch_model_fsdp*.bin": "accelerate's FSDP states without torch's distributed checkpoint: save with "
    "SHARDED_STATE_DICT (use_dcp), or rename a FULL_STATE_DICT to pytorch_model.bin",
    "shard-*-model-*.safetensors": "a process's share of each tensor (NeMo): save with save_consolidated: true",
}
"""By the names of files or folders: what they are, and the remedy; ``{above}`` is the folder above."""


def foreign_layout(folder: Path) -> str | None:
    """Return what a folder holds that is not read, and the remedy; None if nothing is known of it."""
    for depth in range(DEEPEST + 1):
        for name, what in FOREIGN.items():
            found = next(folder.glob("*/" * depth + name), None)
            if found is not None:
                # verl: actor/dist_ckpt or actor/model/dist_ckpt. DeepSpeed: checkpoint-N/global_stepN/FILE.
                above = found.parents[1] if found.parent.name == "model" or found.is_file() else found.parent
                return f"{found} is of {what.format(above=above)}"
    return None

"""Whether a base model is that of a run: under the run's names, with its shapes, and as weights instead of codes."""

import re
from collections.abc import Iterable, Mapping

import torch

from next_core.errors import CheckpointError, other_model
from next_core.sources.hf_model import Architecture, ModelFiles, architecture_of
from next_core.sources.matrices import other_vocabulary, stored_name

QUANTIZED = re.compile(r"(_scale_inv|weight\.?_scales?|weight_packed|qweight|absmax|SCB|W_q|\.codes|proj_blocks)$")
"""Names of what stands next to, or instead of, the numbers of a quantised matrix."""


def use_names(backbone: ModelFiles, names: Iterable[str]) -> None:
    """Use the run's ``names`` for the stored tensors that transformers loads under the same ones."""
    missing = {stored_name(name) for name in names} - backbone.shapes.keys()
    built = architecture_of(backbone.folder) if missing else None
    if built is None:
        return
    wanted = {built.in_memory(name): name for name in missing}
    for key in list(backbone.shapes):
        found, alone = built.in_memory(key)
        name = wanted.get((found, True)) if alone else None
        if name is not None:
            backbone.use_name(key, name)


def require(backbone: ModelFiles, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``CheckpointError`` if a matrix of the run is missing in its backbone or has another shape."""
    use_names(backbone, shapes)
    matrices = backbone.matrices
    differing = {name: tuple(shape) for name, shape in shapes.items() if matrices.get(name) != tuple(shape)}
    built = architecture_of(backbone.folder) if differing else None
    for name, shape in differing.items():
        stored = shape[::-1] if built is not None and built.is_transposed(name) else shape
        if matrices.get(name) != stored:
            raise _difference(backbone, name, matrices.get(name), stored, built)


def _difference(
    backbone: ModelFiles, name: str, here: tuple[int, ...] | None, shape: tuple[int, ...], built: Architecture | None
) -> CheckpointError:
    if here is not None and other_vocabulary(name, here, shape):
        return CheckpointError(
            f"backbone {backbone.folder}: '{name}' has {here[0]} rows and {shape[0]} in the run, so the vocabulary was "
            f"resized after it was saved; load it, call resize_token_embeddings({shape[0]}) and save it, or omit "
            "--backbone where the checkpoints are whole models",
            kind="checkpoint-other-vocabulary",
        )
    found = None if built is None else built.in_memory(stored_name(name))[0]
    if here is None and built is not None and found in {built.in_memory(key)[0] for key in backbone.shapes}:
        plain = ", save_original_format=False" if stored_name(name) in built.names else ""
        return CheckpointError(
            f"backbone {backbone.folder} is the model of this run under other names: it stores '{name}' in pieces or "
            f"with others; load it with transformers and save it by save_pretrained(FOLDER{plain}), or omit --backbone "
            "where the checkpoints are whole models",
            kind="checkpoint-other-names",
        )
    problem = f"has no '{name}'" if here is None else f"'{name}' is {here}, not {shape}"
    unknown = "" if built is not None else ", or stores it under names that cannot be compared without transformers"
    return other_model(f"backbone {backbone.folder}: {problem}; it is not the model of this run{unknown}")


def sign_of_codes(model: ModelFiles) -> str | None:
    """Return the name of a tensor that shows that what is stored are codes of the weights; None if none does."""
    known = next(filter(QUANTIZED.search, model.shapes), None)
    if known is not None or "quantization_config" not in model.config():
        return known
    matrices = (name for name, shape in model.shapes.items() if len(shape) > 1)
    return next((name for name in matrices if _is_coded(model.dtype(name))), None)


def _is_coded(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 1 or not dtype.is_floating_point


def refuse_quantized(model: ModelFiles) -> None:
    """Raise ``CheckpointError`` for a model whose stored numbers are codes of the weights, or scaled."""
    sign = sign_of_codes(model)
    if sign is None:
        return
    settings = model.config().get("quantization_config")
    known = settings if isinstance(settings, dict) else {}
    four = known.get("load_in_4bit") or known.get("_load_in_4bit") or known.get("bits") == 4
    method = f" ({known['quant_method']})" if "quant_method" in known else ""
    raise CheckpointError(
        f"{model.folder} is a {'4-bit' if four else 'quantised'} model{method}: '{sign}' goes with codes and not "
        "weights; pass the unquantised model",
        kind="checkpoint-unsupported-model",
    )

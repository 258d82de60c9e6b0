"""What an adapter's ``adapter_config.json`` says about the meaning of its factors, and which configs are refused."""

import math
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from next_core.errors import CheckpointError, damaged
from next_core.sources.tensor_files import is_unchanged, read_json
from next_core.storage.reading import stamp

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract the first B A from the base weights."""
VARIANTS = {
    "use_dora": "DoRA's magnitude vector rescales whole rows; train with use_dora=False",
    "use_qalora": "QA-LoRA's A reads averages of groups of inputs; train with use_qalora=False",
    "use_bdlora": "BD-LoRA's factors are blocks of a diagonal; train with use_bdlora=None",
    "kasa_config": "KaSA puts singular values between B and A and truncates the base weights; train with plain LoRA",
    "monteclora_config": "MonteCLoRA samples weights around the factors; train with plain LoRA",
    "arrow_config": "Arrow routes each token through several adapters; extrapolate each of them",
}
"""Fields of ``LoraConfig`` that, if set, make the delta something else than scaling * B A."""
MEANINGFUL = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_parameters", "ensure_weight_tying", "fan_in_fan_out", "alora_invocation_tokens", "layer_replication"),
}
"""Fields that are read, here or by an applier."""
IRRELEVANT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core"),
    *("bias", "lora_bias", "modules_to_save", "trainable_token_indices", "velora_config", "qalora_group_size"),
}
"""Fields that do not change what the stored factors mean: initialisation, training, or tensors seen in the file."""
VARIANT_NAME = re.compile(r"use_.+|.+_config")  # How PEFT names the fields of LoRA variants
MOST_PATTERNS = 20_000
REPEATED_GROUP = re.compile(r"\)[*+{]")


class AdapterConfig:
    """The part of PEFT's ``adapter_config.json`` that determines what the factors mean."""

    def __init__(self, path: Path, defaults: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.raw = {**(defaults or {}), **read_json(path, verify=True)}
        self._stamp = stamp(path)
        self._refuse_unsupported()
        self.rslora = bool(self.raw.get("use_rslora"))
        self._patterns = {key: self._compiled(key) for key in ("alpha_pattern", "rank_pattern")}

    def _refuse_unsupported(self) -> None:
        kind, start = self.raw.get("peft_type"), self.raw.get("init_lora_weights")
        variants = [field for field, value in self.raw.items() if value and VARIANT_NAME.fullmatch(field)]
        variant = next((field for field in variants if field not in MEANINGFUL | IRRELEVANT), None)
        if kind != "LORA":
            problem = f"peft_type is {kind!r}; only LORA adapters can be extrapolated"
        elif variant is not None:
            unknown = "this version of next-core does not know it; train with plain LoRA"
            problem = (
                f"with {variant} its delta is not scaling * B A: {VARIANTS.get(variant, unknown)}, or extrapolate "
                "merged checkpoints"
            )
        elif isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
            problem = (
                f"init_lora_weights {start!r} changes the base weights, so B A is not what the model moved by; convert "
                "the adapter with PEFT's path_initial_model_for_weight_conversion"
            )
        else:
            return
        raise CheckpointError(f"{self.path}: {problem}", kind="checkpoint-unsupported-adapter")

    @property
    def target_parameters(self) -> list[str]:
        """The parameters, most often fused experts, that have factors of their own."""
        named = self.raw.get("target_parameters") or []
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise damaged(self.path, "has target_parameters that are no list of names")
        return named

    def scaling(self, module: str, rank: int) -> float:
        """Return alpha / r, or alpha / sqrt(r) for rsLoRA, with PEFT's per-module alpha pattern."""
        alpha = self._number(module, "lora_alpha", "alpha_pattern")
        if alpha == 0.0:
            raise CheckpointError(
                f"{self.path}: lora_alpha of '{module}' is 0, so its factors do nothing; some tools that merge "
                "adapters write 0: put back the value that the adapter was trained with",
                kind="checkpoint-unsupported-adapter",
            )
        return alpha / (rank**0.5 if self.rslora else rank)

    def rank(self, module: str) -> float:
        """Return the rank that the config declares for a module, per-module pattern included."""
        return self._number(module, "r", "rank_pattern")

    def unchanged(self) -> bool:
        """Return whether the file on disk is still the one that was read."""
        return is_unchanged(self.path, self._stamp)

    def _number(self, module: str, key: str, pattern: str) -> float:
        matching = (value for compiled, value in self._patterns[pattern] if compiled.match(module))
        value = next(matching, self.raw.get(key))
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise damaged(self.path, f"gives no number for '{module}' in {key} and {pattern} ({value!r})")
        return float(value)

    def _compiled(self, key: str) -> list[tuple[re.Pattern[str], Any]]:
        """Return the regular expressions of a pattern as PEFT applies them: to the end of a module's name."""
        patterns = self.raw.get(key) or {}
        if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
            raise damaged(self.path, f"has a {key} that does not map module names to numbers")
        compiled = []
        for name, value in patterns.items():
            # Python's matching backtracks: a hostile expression would take longer than anybody waits.
            repeats = sum(map(name.count, "*+?{"))
            if len(name) > 1000 or name.count("(") > 4 or repeats > 4 or REPEATED_GROUP.search(name):
                raise damaged(self.path, f"has too complex an expression in {key}: {reprlib.repr(name)}")
            try:
                compiled.append((re.compile(rf"(.*\.)?({name})$"), value))
            except (re.error, OverflowError, RecursionError) as error:
                raise damaged(
                    self.path, f"has an invalid expression in {key}: {reprlib.repr(name)} ({error})"
                ) from None
        return compiled

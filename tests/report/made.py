"""Folders to report on, made on the spot: a comparison of any size, and a run as its files are."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from next_core.comparison.comparison_results import Interval

Object = dict[str, Any]


def interval(values: Mapping[int, float]) -> Object:
    """As a comparison writes it: no ends with one seed."""
    return Interval.of(values).model_dump()


def jumps(steps: Sequence[int], refused: int = 7, predictor: str = "secant", multiple: bool = False) -> list[Object]:
    """Every ``refused``-th is refused, for one of two reasons."""
    found: list[Object] = []
    for index, step in enumerate(steps):
        accepted = bool((index + 1) % refused)
        norm = f"the jump is {9 + index}.5 times the motion of the last 2 steps; max_norm_ratio is 10"
        found.append(
            {
                "step": step,
                "accepted": accepted,
                "reason": "14 of 14 matrices" if accepted else norm if index % 2 else "accuracy fell; rolled back",
                "norm_ratio": 2.0 + 0.1 * index,
                "alpha": 1.0,
                "predictor": predictor,
                "diagnostics": {"multiple": 1 + 8 * math.sin(0.02 * step) ** 2} if multiple else {"lambda": 0.7},
                "accuracy_before": 0.3 + 0.002 * step,
                "accuracy_after": 0.31 + 0.002 * step if accepted else 0.2,
            }
        )
    return found


def arm(
    ends: Mapping[int, float],
    plain: Mapping[int, float],
    role: str = "arm",
    predictor: str = "secant",
    steps: int = 250,
    tried: Sequence[Object] = (),
    chosen: Object | None = None,
    **more: Any,
) -> Object:
    """One arm that ends at ``ends`` and comes from 0.2; chosen among two settings where ``chosen`` names one."""
    moments, many = list(range(0, steps + 1, 25)), len(ends) > 1

    def way(shift: float) -> Object:
        each = [
            interval({s: 0.2 + shift + (end - 0.2) * (1 - math.exp(-3 * m / steps)) / 0.95 for s, end in ends.items()})
            for m in moments
        ]
        return {key: [one[key] for one in each] for key in ("mean", "low", "high")}

    curve = {"sampled": way(0.0), "greedy": way(0.1)}
    variants = [{"values": chosen or {}, "validation": interval(ends), "test": interval(ends), "chosen": True}]
    if chosen:
        other = {key: number / 2 for key, number in chosen.items()}
        worse = interval({seed: end - 0.05 for seed, end in ends.items()})
        variants.append({"values": other, "validation": worse, "test": worse, "chosen": False})
    difference = None if role == "plain" else interval({seed: end - plain[seed] for seed, end in ends.items()})
    return {
        "role": role,
        "predictor": predictor,
        "chosen": chosen or {},
        "variants": variants,
        "steps": steps,
        "spent_steps": steps * len(variants),
        "test": {"sampled": interval(ends), "greedy": interval({s: e + 0.1 for s, e in ends.items()})},
        "validation": {"sampled": interval(ends), "greedy": None},
        "difference": difference,
        "difference_longer": None if role == "plain" else interval({s: e - plain[s] - 0.1 for s, e in ends.items()}),
        "equals_step": None if role == "plain" else interval({seed: 360.0 + 3 * seed for seed in ends}),
        "beyond": 0,
        "steps_saved": None if role == "plain" else interval({seed: 110.0 + 3 * seed for seed in ends}),
        "icer": {"mean": 9.2, "low": 8.1 if many else None, "high": 10.4 if many and role != "arm" else None},
        "seconds": interval({seed: 0.15 * steps + seed for seed in ends}),
        "seconds_saved": None if role == "plain" else interval({seed: 14.0 - seed for seed in ends}),
        "ours_seconds": interval({seed: 0.4 * len(tried) / 10 for seed in ends}),
        "curve": {"steps": moments, "seconds": [0.15 * m for m in moments], "test": curve, "validation": curve},
        "jumps": {str(seed): list(tried) for seed in ends},
    } | more


def comparison(seeds: int = 3, extra: int = 0) -> Object:
    """The usual arms, and ``extra`` more."""

    def near(mean: float, spread: float = 0.01) -> dict[int, float]:
        return {seed: mean + spread * math.sin(5.0 * seed + 40 * mean) for seed in range(seeds)}

    plain, many = near(0.50), range(20, 241, 2)
    arms = {
        "plain": arm(plain, plain, role="plain", predictor="stay"),
        "longer": arm(near(0.61), plain, role="plain", predictor="stay", steps=400),
        "tuned learning rate": arm(
            near(0.78), plain, role="control", predictor="stay", chosen={"training.learning_rate": 1e-3}, beyond=seeds
        ),
        "no jump": arm(plain, plain, role="control", predictor="stay", tried=jumps(range(50, 250, 10), 10**6, "stay")),
        "random direction": arm(
            near(0.48, 0.03), plain, role="control", predictor="random", tried=jumps(range(50, 250, 10), 4, "random")
        ),
        "auto": arm(near(0.75), plain, predictor="auto", tried=jumps(many, 30, "auto", multiple=True), beyond=1),
        "secant": arm(near(0.66, 0.02), plain, tried=jumps(range(50, 250, 10)), chosen={"schedule.alpha": 4.0}),
        "next-mlp": arm(near(0.51, 0.02), plain, predictor="next-mlp", tried=jumps([150], 10**6, "next-mlp")),
    }
    for index in range(extra):
        arms[f"secant, window {10 * index + 10}"] = arm(
            near(0.55 + 0.01 * index), plain, tried=jumps(range(50, 250, 10), 5)
        )
    return {
        "versions": {"next-core": "0.1.0", "torch": "2.13.0", "trl": "1.16.0"},
        "hardware": "2 CPU cores (x86_64)",
        "config": {"steps": 250, "seeds": list(range(seeds)), "run": {"predictor": {"name": "stay"}}},
        "steps": 250,
        "longer": 400,
        "seeds": list(range(seeds)),
        "metric": "sampled",
        "steps_run": 9000,
        "steps_shared": 600,
        "rollouts_per_step": 128,
        "base": {"validation": {"sampled": 0.21, "greedy": 0.3}, "test": {"sampled": 0.2, "greedy": 0.3}},
        "arms": arms,
    }


def write_comparison(folder: Path, found: Object) -> Path:
    """A comparison's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(found))
    return folder

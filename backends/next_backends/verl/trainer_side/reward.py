"""The run config's reward, which next-core serves. Runs in verl's reward workers."""

import json
import os
import urllib.request
from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any], **_: Any
) -> float:
    """Return the reward of one completion."""
    prompt = extra_info["prompt"]
    body = {"query": [prompt + solution_str], "prompts": [prompt], "labels": [ground_truth]}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(os.environ["NEXT_CORE_REWARD"], json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return float(json.load(answer)["rewards"])

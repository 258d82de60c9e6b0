"""The environment that OpenRLHF is installed in, and what its own parser says about a command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from next_backends.external.environment import ask
from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig

VERSION = "0.11.2"  # The release of OpenRLHF that this backend drives
TRAINER_SIDE = Path(__file__).parent / "trainer_side"
PARSE = TRAINER_SIDE / "parse.py"


def parse(config: OpenRlhfConfig, options: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that OpenRLHF's own parser and checks make of a command line. Raises as ``ask`` does."""
    return ask(config, "OpenRLHF", VERSION, PARSE, options)

"""TEST-ONLY: what OpenRLHF imports of flash-attn, which has no build for the CPU; calling any of it fails."""

from typing import Any, NoReturn

__version__ = "0.0.0"


def absent(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError("this is the tests' stand-in for flash-attn: packed samples need the real one")

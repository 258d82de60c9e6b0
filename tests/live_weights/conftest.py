"""Where states to return to are kept."""

from pathlib import Path

import pytest


@pytest.fixture(params=["in memory", "on disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Where states are written."""
    return tmp_path / "kept" if request.param == "on disk" else None

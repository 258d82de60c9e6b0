"""The gate proves again what has changed, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import proved

PLACE = Path(proved.__file__).relative_to(proved.ROOT)


def run(tree: Path, argument: str) -> str:
    done = subprocess.run([sys.executable, tree / PLACE, argument], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("target", proved.COVERS)
def test_a_record_holds_until_a_covered_file_changes(tmp_path: Path, target: str) -> None:
    covered = proved.COVERS[target]
    for name in covered:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("") if name.endswith(".py") else (tmp_path / name / "part").mkdir(parents=True)
    (tmp_path / PLACE).parent.mkdir(exist_ok=True)
    shutil.copy(proved.__file__, tmp_path / PLACE)
    assert target in run(tmp_path, "--stale").split()

    record = tmp_path / "tests" / "proofs" / f"{target}.sha256"
    record.parent.mkdir()
    record.write_text(run(tmp_path, target) + "\n")
    assert target not in run(tmp_path, "--stale").split()
    (tmp_path / "next_core" / "errors.py").write_text("# not of what is proved")
    folder = next(tmp_path / name for name in covered if not name.endswith(".py"))
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").write_text("")
    assert target not in run(tmp_path, "--stale").split()

    for name in covered:
        file = tmp_path / name if name.endswith(".py") else tmp_path / name / "part" / "new.py"
        before = file.read_text() if file.exists() else None
        file.write_text("changed = True")
        assert target in run(tmp_path, "--stale").split(), name
        file.unlink() if before is None else file.write_text(before)
        assert target not in run(tmp_path, "--stale").split(), name


def test_what_is_covered_is_there() -> None:
    for target, covered in proved.COVERS.items():
        assert [name for name in covered if not (proved.ROOT / name).exists()] == []
        assert f"\n{target}:" in (proved.ROOT / "Makefile").read_text()

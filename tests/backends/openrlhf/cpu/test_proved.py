"""The gate proves again what has changed, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.backends.openrlhf.cpu import proved

PLACE = Path(proved.__file__).relative_to(proved.ROOT)


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, tree / PLACE, *arguments], capture_output=True, text=True, check=False)


def test_a_record_holds_until_a_proved_file_changes(tmp_path: Path) -> None:
    for name in proved.PROVED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("") if name.endswith(".py") else (tmp_path / name / "part").mkdir(parents=True)
    (tmp_path / PLACE).parent.mkdir()
    shutil.copy(proved.__file__, tmp_path / PLACE)
    assert run(tmp_path, "--check").returncode == 1

    record = tmp_path / proved.RECORD.relative_to(proved.ROOT)
    record.write_text(run(tmp_path).stdout)
    assert run(tmp_path, "--check").returncode == 0
    (tmp_path / "next_core" / "errors.py").write_text("# not of what is proved")
    (tmp_path / proved.PROVED[0] / "__pycache__").mkdir()
    (tmp_path / proved.PROVED[0] / "__pycache__" / "a.pyc").write_text("")
    assert run(tmp_path, "--check").returncode == 0

    for name in proved.PROVED:
        file = tmp_path / name if name.endswith(".py") else tmp_path / name / "part" / "new.py"
        before = file.read_text() if file.exists() else None
        file.write_text("changed = True")
        assert run(tmp_path, "--check").returncode == 1, name
        file.unlink() if before is None else file.write_text(before)
        assert run(tmp_path, "--check").returncode == 0, name

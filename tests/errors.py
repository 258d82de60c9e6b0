"""One way to assert an error of ours: its kind, and the names that its message must carry."""

import contextlib
from collections.abc import Iterator

import pytest

from next_core.errors import NextCoreError


@contextlib.contextmanager
def raises_kind(kind: str, *names: object) -> Iterator[pytest.ExceptionInfo[NextCoreError]]:
    """Expect a ``NextCoreError`` of this kind whose message contains each of ``names``."""
    with pytest.raises(NextCoreError) as caught:
        yield caught
    assert caught.value.kind == kind, caught.value
    for name in names:
        assert str(name) in caught.value.message, f"{name!r} is not in: {caught.value}"

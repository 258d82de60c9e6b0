"""Random damage to bytes, and to the values of JSON and YAML, so that files are nearly valid."""

import copy
import json
from random import Random
from typing import Any

from next_core.storage.reading import with_checksum

NUMBERS = (0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324, float("nan"))
TEXTS = (
    *("", "..", "/", "../x", "/etc/passwd", ".", "a\0b", "\ud800", "é" * 300),
    *("[/x]", "(a+)+$", "%s{0}", "NaN", "1e5"),
)
VALUES: tuple[Any, ...] = (
    *(*NUMBERS, *TEXTS, None, True, float("inf")),
    *([], {}, [[]], [1, "a"], {"name": "x"}, {"": None}),
)
TOKENS = (
    *("{", "}", "[", "]", '"', ",", ":", "null", "NaN", "-Infinity", "1e999", "1" + "0" * 10_000, "0x" + "f" * 5000),
    *("-", "\n", "\t", "\0", "\xff", "\\ud800", "&a ", "*a", "<<: *a", "!!binary x", "!!set {a, b}"),
    *("!!python/object:os.x", "? ", "- ", "2024-13-01", "2024-02-02", "1:30:59", ".nan", ".inf", "1_000", "0o17"),
    *("~", "|", ">", "%YAML 9.9\n", "---\n", "...\n", "[" * 3000, '{"a":' * 3000, "9" * 5000 + "e", "=", "yes"),
    *("'", "#", "é", "\u2028"),
)


def of_bytes(random: Random, data: bytes) -> bytes:
    """Delete, insert or replace a few ranges of the data."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(found) + 1)
        to = at + random.choice((0, 0, 1, 1, 1, 2, 8, 40, len(found)))
        token, part = random.choice(TOKENS).encode("utf-8", "surrogatepass"), found[random.randrange(len(found) + 1) :]
        found[at:to] = random.choice((b"", token, random.randbytes(1), part[:40]))
    return bytes(found)


def of_value(random: Random, value: Any) -> Any:
    """Replace, remove, add, rename or duplicate a few parts of nested lists and dicts."""
    root = [copy.deepcopy(value)]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        parent, key = random.choice(_places(root))
        other_parent, other_key = random.choice(_places(root))
        way = random.randrange(7)
        if way < 3:
            parent[key] = copy.deepcopy(random.choice(VALUES))
        elif way == 3 and parent is not root:
            del parent[key]
        elif way == 4 and isinstance(parent, dict):
            parent[random.choice((*TEXTS, *parent, "step", "name"))] = parent.pop(key)
        elif way == 5:
            parent[key] = copy.deepcopy(other_parent[other_key])
        elif isinstance(parent[key], list | dict) and parent[key]:
            parent[key] = [parent[key], copy.deepcopy(parent[key])] if random.random() < 0.5 else {"a": parent[key]}
    return root[0]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every value below, as its list or dict and the index or key there."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def of_json(random: Random, data: bytes) -> bytes:
    """Damage a JSON file, which may be read as YAML, in its bytes or in its values."""
    return of_bytes(random, data) if random.random() < 0.5 else json.dumps(of_value(random, json.loads(data))).encode()


def of_checked(random: Random, data: bytes) -> bytes:
    """Damage a JSON object with its checksum, or change its values and correct the checksum."""
    if random.random() < 0.3:
        return of_bytes(random, data)
    record = json.loads(data)
    record.pop("crc32")
    text = json.dumps(of_value(random, record)).encode()
    text = of_bytes(random, text) if random.random() < 0.3 else text
    return with_checksum(text.decode("utf-8", "replace"))


def of_lines(random: Random, data: bytes) -> bytes:
    """Damage, duplicate or swap lines of such objects."""
    lines = data.splitlines(keepends=True)
    at = random.randrange(len(lines))
    way = random.randrange(5)
    if way == 0:
        lines.insert(at, random.choice(lines))
    elif way == 1:
        lines[at], lines[0] = lines[0], lines[at]
    else:
        lines[at] = of_checked(random, lines[at]) + b"\n"
    return b"".join(lines)


def of_safetensors(random: Random, data: bytes) -> bytes:
    """Damage a safetensors file, or change its header; the length of the header is mostly right."""
    if random.random() < 0.3:
        return of_bytes(random, data)
    size = int.from_bytes(data[:8], "little")
    header = of_json(random, data[8 : 8 + size].strip())
    length = random.choice(NUMBERS[:6]) if random.random() < 0.05 else len(header)
    return (int(length) % 2**64).to_bytes(8, "little") + header + data[8 + size :]

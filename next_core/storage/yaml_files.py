"""YAML files in bounds: safe, a duplicate key is an error, and neither size, depth nor aliases can exhaust memory."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from next_core.errors import ConfigError
from next_core.storage.reading import read_text

MAX_NODES = 10_000
"""Values of one YAML document; aliases can make a few lines stand for billions."""
MAX_YAML = 2**20
"""Bytes of a YAML file."""
MAX_DEPTH = 100
MAX_DIGITS = 100


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that is there twice is an error, and 1e-4 (YAML 1.1's text) is a number."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= MAX_DEPTH:  # the scanner looks at every level for every token
            raise yaml.scanner.ScannerError(None, None, f"more than {MAX_DEPTH} brackets deep", self.get_mark())
        super().fetch_flow_collection_start(token)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node) if len(node.value) <= MAX_DIGITS else 2**64
        if abs(value) >= 2**64:
            raise yaml.constructor.ConstructorError(None, None, "the number does not fit in 64 bits", node.start_mark)
        return value

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._composed = getattr(self, "_composed", 0) + 1
        if self._composed > MAX_NODES:  # before all of a huge document is read
            raise yaml.constructor.ConstructorError(None, None, f"more than {MAX_NODES} values")
        return super().compose_node(parent, index)

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _bound(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # <<: *defaults, whose keys yield to those beside it
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _bound(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many nodes a document has with its aliases written out. Raises for more than any config needs."""
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise yaml.constructor.ConstructorError(None, None, "an alias stands within what it names", node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0
    children = [c for pair in node.value for c in pair] if isinstance(node, yaml.MappingNode) else node.value
    size = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_bound(child, sizes) for child in children))
    if size > MAX_NODES:
        raise yaml.constructor.ConstructorError(
            None, None, f"more than {MAX_NODES} values once aliases are written out", node.start_mark
        )
    sizes[id(node)] = size
    return size


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str, where: str) -> Any:
    """Parse safe YAML. Raises ``ConfigError`` with the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML lets some of Python's own through, as for the date 2024-13-01
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def load_yaml(file: Path, keys: str) -> dict[str, Any]:
    """A YAML file that is a mapping; ``keys`` says where its keys are told. Raises ``ConfigError``."""
    try:
        text = read_text(file, MAX_YAML)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text") from None
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    raw = parse_yaml(text, str(file))
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} must be a mapping of keys, {keys}")
    return raw

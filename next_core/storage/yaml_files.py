"""Safe YAML within limits: duplicate keys are errors, and neither size, depth nor aliases can exhaust memory."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from next_core.errors import ConfigError
from next_core.storage.reading import read_text

MAX_NODES = 10_000
"""Limit of values in one document, aliases written out: a few lines of aliases can stand for billions."""
MAX_YAML = 2**20  # Limit in bytes of a YAML file
MAX_DIGITS = 100


class _Loader(yaml.SafeLoader):
    """Safe YAML with errors for duplicate keys and oversized documents; 1e-4, a text in YAML 1.1, is a number."""

    _composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._composed += 1
        if self._composed > MAX_NODES:  # stops before all of a huge document is read
            raise ConstructorError(None, None, f"more than {MAX_NODES} values")
        return super().compose_node(parent, index)

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node) if len(node.value) <= MAX_DIGITS else 2**64
        if abs(value) >= 2**64:
            raise ConstructorError(None, None, "the number does not fit in 64 bits", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # <<: *defaults, whose keys may be overridden
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):  # SafeLoader refuses the others
                if key in seen:
                    raise ConstructorError(None, None, f"the key '{key}' appears twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return the number of values below a node with aliases written out; raise above ``MAX_NODES`` and for a loop."""
    if id(node) not in counts:
        counts[id(node)] = 0  # while its children are counted: finding 0 again means that the node contains itself
        children = [c for pair in node.value for c in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = 0 if isinstance(node, yaml.ScalarNode) else sum(_count_values(child, counts) for child in children)
        counts[id(node)] = 1 + inner
        if inner >= MAX_NODES:
            raise ConstructorError(None, None, f"more than {MAX_NODES} values in its aliases", node.start_mark)
    elif counts[id(node)] == 0:
        raise ConstructorError(None, None, "an alias refers to what contains it", node.start_mark)
    return counts[id(node)]


def parse_yaml(text: str, where: str) -> Any:
    """Parse safe YAML. Raises ``ConfigError`` with the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML also passes on Python's own errors, as for the date 2024-13-01
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}", kind="config-yaml") from None


def load_yaml(file: Path, keys: str) -> dict[str, Any]:
    """Return a YAML file that is a mapping; ``keys`` says where its keys are documented. Raises ``ConfigError``."""
    try:
        text = read_text(file, MAX_YAML)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason
        raise ConfigError(f"{file} cannot be read: {reason}", kind="config-missing-file") from None
    content = parse_yaml(text, str(file))
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must be a mapping of keys, {keys}", kind="config-yaml")
    return content

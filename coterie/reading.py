"""YAML that a person wrote, or somebody unknown: read in bounded time and memory, and strictly."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

from coterie.errors import UserError

MAX_BYTES = 100_000  # of a recipe, or of a value on the command line
MAX_VALUES = 10_000  # with every alias written out
MAX_DEPTH = 30
MAX_DIGITS = 300  # of a number
_SHOWN = 80


class _StrictLoader(yaml.SafeLoader):
    """YAML without its silent habit of letting a later key replace an earlier equal one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise UserError(f"{_line(key_node)}the key {short(key)} stands twice")
            seen.add(key if isinstance(key, str) else str(key))
        return super().construct_mapping(node, deep=deep)


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises UserError, with the line where there is one, for what is broken or too large."""
    if len(text) > MAX_BYTES:
        raise UserError(f"has {len(text):,} characters, and {MAX_BYTES:,} are allowed")
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{place}not valid YAML: {said[:200]}") from None
    except RecursionError:
        raise UserError("is nested too deeply") from None
    except UserError:
        raise
    except (ValueError, OverflowError) as error:  # a date that there is not, say
        raise UserError(f"holds a value that can't be read: {str(error)[:200]}") from None


def read_yaml_file(path: Path) -> Any:
    """As `read_yaml`, of a file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError("is no plain file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"has {path.stat().st_size:,} bytes, and {MAX_BYTES:,} are allowed")
        return read_yaml(data.decode("utf-8-sig"))
    except UserError as error:
        line, _, said = str(error).removeprefix("line ").partition(": ")
        raise UserError(f"{path}:{line}: {said}" if said.startswith("not valid") else f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _check_size(root: yaml.Node) -> None:
    """UserError where a document is too deep, holds itself, or with its aliases written out holds too many values.

    It is walked as it would be written out, and no further than is allowed.
    """
    num_values, waiting = 1, [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        inner = _inside(node)
        num_values += len(inner)
        if depth > MAX_DEPTH:
            raise UserError(f"{_line(node)}is nested too deeply: {MAX_DEPTH} levels are allowed")
        if num_values > MAX_VALUES:
            raise UserError(f"{_line(node)}holds more than {MAX_VALUES:,} values, with its aliases written out")
        waiting += [(value, depth + 1) for value in inner]


def _inside(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    if isinstance(node, yaml.SequenceNode):
        return node.value
    if len(node.value) > MAX_DIGITS and node.tag.endswith((":int", ":float", ":timestamp")):
        raise UserError(f"{_line(node)}is a number of {len(node.value):,} characters")
    return []


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}: "


def short(value: object) -> str:
    """A value as Python writes it, cut where it is long."""
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:  # Python refuses to write one of more than 4,300
        return "a number of too many digits"
    said = repr(value) if not isinstance(value, str) else repr(value[: 2 * _SHOWN])
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}..."

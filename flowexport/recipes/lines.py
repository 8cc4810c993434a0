"""YAML with the line of every key and value, so that an error can point at it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flowexport.core.errors import RecipeError

MAX_BYTES = 1 << 20

Keys = tuple[str | int, ...]


@dataclass
class Located:
    """A parsed document with the line (from 1) of each of its keys and values."""

    file: str
    value: Any
    keys: dict[Keys, int] = field(default_factory=dict)
    values: dict[Keys, int] = field(default_factory=dict)

    def where(self, path: Keys) -> str:
        """Return ``file:line`` of a value, or of the nearest thing around it."""
        for end in range(len(path), -1, -1):
            line = self.keys.get(path[:end]) or self.values.get(path[:end])
            if line is not None:
                return f"{self.file}:{line}"
        return self.file


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """SafeLoader in which ``1e-3`` is a number, as YAML 1.2 has it, and dates are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, regexp) for tag, regexp in pairs if not tag.endswith((":float", ":timestamp"))
        ]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.inf|\.nan)$"
    ),
    list("-+0123456789."),
)


def load_yaml(path: Path) -> Located:
    """Read one YAML file.

    Args:
        path: a file of at most 1 MiB; anchors and aliases are refused.

    Raises:
        RecipeError: the file is missing, too large, no UTF-8 or no YAML, or a key is there twice.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(
                f"recipe {path}: has {path.stat().st_size} bytes; expected at most {MAX_BYTES}."
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"recipe {path}: byte {error.start} is no UTF-8; expected YAML text."
        ) from error
    except OSError as error:
        raise RecipeError(
            f"recipe {path}: cannot be read: {error.strerror}.",
            fix="`flowexport list` shows the recipes",
        ) from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, file: str) -> Located:
    """Parse YAML text; ``file`` is its name in messages."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        located = Located(file, None)
        if node is not None:
            located.value = _build(loader, node, (), located, set())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise RecipeError(f"{file}:{line}: {error.problem or error.context}; expected YAML.") from (
            error
        )
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: {str(error).splitlines()[0]}; expected YAML.") from error
    except RecursionError as error:
        raise RecipeError(f"{file}: is nested too deeply; expected a recipe.") from error
    finally:
        loader.dispose()
    return located


def _build(loader: _Loader, node: yaml.Node, path: Keys, out: Located, seen: set[int]) -> Any:
    line = node.start_mark.line + 1
    if id(node) in seen:  # an alias could multiply a small file into a huge value
        raise RecipeError(f"{out.file}:{line}: has a YAML alias; expected the value written out.")
    seen.add(id(node))
    out.values[path] = line
    if not node.tag.startswith("tag:yaml.org,2002:") or "/" in node.tag:
        raise RecipeError(f"{out.file}:{line}: has the tag {node.tag!r}; expected YAML without.")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{out.file}:{key_line}: a key is no text; expected a name.")
            key = str(key_node.value)
            if key in result:
                first = out.keys[(*path, key)]
                raise RecipeError(
                    f"{out.file}:{key_line}: key {key!r} is there twice (first on line {first})."
                )
            out.keys[(*path, key)] = key_line
            result[key] = _build(loader, value_node, (*path, key), out, seen)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, n, (*path, i), out, seen) for i, n in enumerate(node.value)]
    value = loader.construct_object(node)
    if not isinstance(value, (str, int, float, bool, type(None))):
        raise RecipeError(
            f"{out.file}:{line}: has a {type(value).__name__}; expected text or a number."
        )
    return value

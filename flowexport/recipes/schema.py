"""Check a recipe against its published schema; every problem with file and line."""

from __future__ import annotations

import json
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from flowexport.core.errors import RecipeError
from flowexport.recipes.lines import Keys, Located


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``flowexport.recipe/1``."""
    text = files("flowexport.recipes").joinpath("recipe.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def check_document(located: Located) -> None:
    """Raise RecipeError unless the document follows the schema.

    The message has one line a problem, in the file's order:
    ``recipes/a.yaml:7: unknown key 'precison' in targets.onnx; expected one of: ...``.
    """
    import jsonschema

    validator = jsonschema.Draft202012Validator(recipe_schema())
    problems: list[tuple[int, str]] = []
    fixes: list[str] = []
    for error in validator.iter_errors(located.value):
        path: Keys = tuple(error.absolute_path)
        for at, text, fix in _explain(error, path):
            where = located.where(at)
            line = int(where.rpartition(":")[2]) if where != located.file else 0
            problems.append((line, f"{where}: {text}"))
            if fix:
                fixes.append(fix)
    if problems:
        lines = [text for _, text in sorted(problems)]
        raise RecipeError("\n".join(lines), fix="; ".join(dict.fromkeys(fixes)) or None)


def _explain(error: Any, path: Keys) -> list[tuple[Keys, str, str | None]]:
    """Turn one schema error into (where, message, fix)."""
    name = ".".join(str(p) for p in path) or "the recipe"
    rule, value, wanted = error.validator, error.instance, error.validator_value
    if rule == "additionalProperties":
        valid = sorted(error.schema.get("properties", {}))
        unknown = [k for k in value if k not in valid]
        inside = "" if not path else f" in {name}"
        return [
            (
                (*path, key),
                f"unknown key {key!r}{inside}; expected one of: {', '.join(valid)}.",
                _suggest(key, valid),
            )
            for key in unknown
        ]
    if rule == "required":
        missing = [k for k in wanted if k not in value]
        text = {
            "reason": f"{name} has no reason; expected `reason:` to say why these limits hold.",
            "schema": f"{name} has no schema; expected `schema: flowexport.recipe/1`.",
        }
        return [
            (path, text.get(k, f"{name} has no {k!r}; expected the key {k!r}."), None)
            for k in missing
        ]
    if rule in ("enum", "const"):
        valid = [wanted] if rule == "const" else list(wanted)
        listed = ", ".join(map(str, valid))
        return [
            (path, f"{name} is {value!r}; expected one of: {listed}.", _suggest(str(value), valid))
        ]
    if rule == "type":
        types = [wanted] if isinstance(wanted, str) else wanted
        words = {"object": "a mapping", "array": "a list", "string": "text", "null": "nothing"}
        listed = " or ".join(words.get(t, f"a {t}") for t in types)
        return [(path, f"{name} is {_short(value)}; expected {listed}.", None)]
    if rule == "minProperties":
        return [(path, f"{name} is empty; expected at least one entry.", None)]
    if rule == "maxProperties":
        return [(path, f"{name} has {len(value)} entries; expected at most {wanted}.", None)]
    limits = {
        "minimum": "at least",
        "maximum": "at most",
        "exclusiveMinimum": "more than",
        "minLength": "a length of at least",
        "maxLength": "a length of at most",
        "minItems": "a length of at least",
        "pattern": "text that matches",
    }
    if rule in limits:
        return [(path, f"{name} is {_short(value)}; expected {limits[rule]} {wanted}.", None)]
    return [(path, f"{name}: {error.message}.", None)]


def _suggest(name: str, valid: list[Any]) -> str | None:
    near = get_close_matches(name, [str(v) for v in valid], n=1)
    return f"did you mean {near[0]!r}?" if near else None


def _short(value: Any) -> str:
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."

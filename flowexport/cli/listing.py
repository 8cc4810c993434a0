"""``flowexport list``: models, recipes and targets."""

from __future__ import annotations

from typing import Any

from flowexport.cli import options
from flowexport.cli.console import complain, out_console, print_json


def list_all(json: options.Json = False) -> int:
    """List the models, recipes and targets that are installed."""
    from rich.table import Table

    document = _collect()
    for broken in document["broken"]:
        complain(f"warning: {broken['kind']} {broken['name']}: {broken['reason']}")
    if json:
        print_json(document)
        return 0
    columns = {
        "recipes": ("name", "model", "targets", "description"),
        "models": ("name", "weights", "dataset", "description"),
        "targets": ("name", "suffix", "precisions"),
    }
    console = out_console()
    for kind, names in columns.items():
        table = Table(title=kind, title_justify="left", pad_edge=False)
        for name in names:
            table.add_column(name, overflow="fold")
        for row in document[kind]:
            values = (row[name] for name in names)
            table.add_row(*(", ".join(v) if isinstance(v, list) else str(v or "-") for v in values))
        console.print(table)
    return 0


def _collect() -> dict[str, Any]:
    from flowexport.core.errors import FlowExportError
    from flowexport.registry import MODELS, OPS, TARGETS
    from flowexport.resolve import find_recipe, shipped_recipes

    broken = [
        {"kind": registry.kind, "name": name, "reason": reason}
        for registry in (TARGETS, OPS, MODELS)
        for name, reason in registry.broken().items()
    ]
    recipes = []
    for name, path in shipped_recipes().items():
        try:
            recipe = find_recipe(path)
        except FlowExportError as error:
            broken.append({"kind": "recipe", "name": name, "reason": error.message})
            continue
        recipes.append(
            {
                "name": name,
                "model": str(recipe.model),
                "targets": list(recipe.targets or TARGETS.names()),
                "description": recipe.description.strip(),
                "path": str(path),
            }
        )
    models = [
        {
            "name": name,
            "weights": "shipped" if spec.weights else None,
            "dataset": spec.dataset,
            "inputs": [s.to_json() for s in spec.inputs],
            "paper": spec.paper,
            "description": spec.description,
        }
        for name, spec in sorted(MODELS.working().items())
    ]
    targets = [
        {"name": name, "suffix": t.suffix, "precisions": [p.value for p in t.precisions]}
        for name, t in sorted(TARGETS.working().items())
    ]
    return {"recipes": recipes, "models": models, "targets": targets, "broken": broken}

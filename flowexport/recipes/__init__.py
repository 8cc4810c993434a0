"""Recipes: what to export and what each artifact is held to, checked against a schema."""

from flowexport.recipes.recipe import (
    Bench,
    Calibration,
    ModelRef,
    Recipe,
    Weights,
    hash_json,
    load_recipe,
    parse_model,
    parse_shape,
)
from flowexport.recipes.schema import recipe_schema
from flowexport.recipes.tolerances import DEFAULT_TOLERANCES

__all__ = [
    "DEFAULT_TOLERANCES",
    "Bench",
    "Calibration",
    "ModelRef",
    "Recipe",
    "Weights",
    "hash_json",
    "load_recipe",
    "parse_model",
    "parse_shape",
    "recipe_schema",
]

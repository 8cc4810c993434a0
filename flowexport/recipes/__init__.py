"""Recipes: what to export and what each artifact is held to, checked against a schema."""

from flowexport.recipes.recipe import (
    DEFAULT_TOLERANCES,
    Bench,
    ModelRef,
    Recipe,
    Weights,
    hash_json,
    load_recipe,
    parse_model,
    parse_shape,
)
from flowexport.recipes.schema import recipe_schema

__all__ = [
    "DEFAULT_TOLERANCES",
    "Bench",
    "ModelRef",
    "Recipe",
    "Weights",
    "hash_json",
    "load_recipe",
    "parse_model",
    "parse_shape",
    "recipe_schema",
]

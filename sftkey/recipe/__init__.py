"""Recipes: what a run trains, on what, and how it is judged; nothing here imports torch."""

from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe"]

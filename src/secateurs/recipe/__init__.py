"""Recipes: a pruning run as a YAML file, validated before anything expensive.

A recipe uses the words of the Python arguments. It names a built-in `task`, or the user's own
`model` and `data` functions by import path (`package.module:function` or `path/file.py:function`),
and exactly one of `budget` and `threshold`; `stages` holds a list of such blocks that run in order.
"""

from secateurs.recipe.fields import Recipe, StageRecipe
from secateurs.recipe.reading import override, parse_recipe, read_recipe

__all__ = ["Recipe", "StageRecipe", "override", "parse_recipe", "read_recipe"]

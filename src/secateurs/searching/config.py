"""What a search is asked for: the block `search:` of a recipe.

The nouns live in `secateurs.asked`, because a recipe holds them and stands before this room.
"""

from secateurs.asked.search import GOALS, SAMPLERS, SIZES, Candidate, Folds, Range, Search, Space

__all__ = ["GOALS", "SAMPLERS", "SIZES", "Candidate", "Folds", "Range", "Search", "Space"]

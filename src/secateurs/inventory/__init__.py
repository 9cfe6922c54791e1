"""What can be pruned and how much that is, what cannot and why: as numbers and as a table. A leaf.

    inventory(graph, kinds, structured) -> Inventory    table(Inventory) -> text

`Graph.summary` and `secateurs analyze` show it. The room asks of a graph no more than the fields
that `counting` names, so that the nouns of `secateurs.types` can use it.
"""

from secateurs.inventory.counting import inventory
from secateurs.inventory.rows import GroupRow, Inventory, Place, Reach, Share, WholeRow, percent
from secateurs.inventory.table import ADVICE, common_module, range_text, table

__all__ = [
    "ADVICE",
    "GroupRow",
    "Inventory",
    "Place",
    "Reach",
    "Share",
    "WholeRow",
    "common_module",
    "inventory",
    "percent",
    "range_text",
    "table",
]

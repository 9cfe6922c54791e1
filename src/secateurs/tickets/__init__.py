"""Sparse from the start: pruning before training, lottery tickets, and a new start for sparse nets.

    model, Budget      -- prune_at_init         -> Plan     what never needs to be trained
    model, Finetune    -- find_ticket           -> Ticket   train, cut, rewind, again
    masks              -- reinitialise_sparse_  -> rows     fresh weights, scaled by kept fan-in

What comes out is masks: train with `hold_masks`, `finetune(masks=plan.masks)` or `train_ticket`.
"""

from secateurs.tickets.config import AtInit, TicketSearch
from secateurs.tickets.fresh import FreshRow, reinitialise_sparse_
from secateurs.tickets.initial import METHODS, prune_at_init
from secateurs.tickets.lottery import Ticket, TicketRow, find_ticket, train_ticket

__all__ = [
    "METHODS",
    "AtInit",
    "FreshRow",
    "Ticket",
    "TicketRow",
    "TicketSearch",
    "find_ticket",
    "prune_at_init",
    "reinitialise_sparse_",
    "train_ticket",
]

"""Checkpoints: leave a run at any instant, even by kill -9, and go on as if nothing had happened.

    Checkpoints("folder", every=100) -> .due(step), .save(step, state), .latest()

`finetune`, `prune` and `secateurs run` use them by `checkpoint=` and `resume=`; in a loop of your
own save what it needs: weights, optimizer, `random_state()`, counters. A run that goes on from a
checkpoint ends bit for bit where it would have ended, on a CPU with the same number of threads.
"""

from secateurs.checkpoints.files import read_state, write_state
from secateurs.checkpoints.interrupts import Interrupt, interrupts_wait
from secateurs.checkpoints.keeping import Checkpoints, Keeper, Saved
from secateurs.checkpoints.marks import (
    UNREPEATABLE,
    Marks,
    batch_mark,
    data_marks,
    differences,
    plain,
    tensor_mark,
    versions,
)
from secateurs.checkpoints.randomness import (
    generator_states,
    generators_of,
    random_state,
    set_generator_states,
    set_random_state,
)
from secateurs.checkpoints.together import Together, keeper_of, same_data
from secateurs.checkpoints.trees import flatten, restore
from secateurs.tensorfiles import flush

__all__ = [
    "UNREPEATABLE",
    "Checkpoints",
    "Interrupt",
    "Keeper",
    "Marks",
    "Saved",
    "Together",
    "batch_mark",
    "data_marks",
    "differences",
    "flatten",
    "flush",
    "generator_states",
    "generators_of",
    "interrupts_wait",
    "keeper_of",
    "plain",
    "random_state",
    "read_state",
    "restore",
    "same_data",
    "set_generator_states",
    "set_random_state",
    "tensor_mark",
    "versions",
    "write_state",
]

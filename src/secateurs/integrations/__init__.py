"""Where people already train: callbacks for Lightning, Hugging Face `Trainer` and Keras.

Each is a few lines around `secateurs.prune_during` and imports its library only when it is
imported itself: `from secateurs.integrations.lightning import Pruning`. Accelerate needs nothing of
its own: what `accelerator.prepare` returns goes into `prune_during` as it is.
"""

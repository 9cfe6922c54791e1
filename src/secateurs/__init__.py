"""secateurs: gradient-based pruning for PyTorch models."""

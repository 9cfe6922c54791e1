"""Models of many architectures with random weights, for the laws of the structural engine."""

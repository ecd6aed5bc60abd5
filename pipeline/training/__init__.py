"""Fitting ε_θ: the loop, the averaged weights, checkpoints, and data-parallel workers."""

"""Downstream benchmarks: what a model is worth besides its validation loss."""

"""Weights that are codes of a number format: arrays, gradients, files."""

"""Weights stored as codes of a number format: arrays, gradients and files."""

"""Losses and accuracies of optimizers, and what they depend on."""

"""The optimizers, as chains of the transforms."""

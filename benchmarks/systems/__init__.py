"""The costs of training: time, memory, and which models fit on a chip."""

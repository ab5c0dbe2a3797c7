"""How well optimizers train: losses, accuracies, and what they depend on."""

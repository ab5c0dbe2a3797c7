"""Number formats of weights and of moments."""

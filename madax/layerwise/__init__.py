"""Training one layer at a time."""

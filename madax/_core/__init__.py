"""What all rooms need: arithmetic, checks, names, and nothing about weights."""

"""Arithmetic, checks and names that all rooms share; nothing about weights."""

"""Benchmarks of madax: ``python -m benchmarks --help``."""

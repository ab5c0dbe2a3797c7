"""Benchmarks of madax: ``python -m benchmarks --help``."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"  # The records, tables and figures.

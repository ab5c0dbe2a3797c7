"""Shared code of the benchmarks: records, tables, figures, training and sweeps."""

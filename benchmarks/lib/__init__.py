"""What the benchmarks share: records, tables, figures, training and sweeps."""

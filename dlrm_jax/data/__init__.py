"""Data: raw log -> Dataset (arrays in memory) -> batches."""

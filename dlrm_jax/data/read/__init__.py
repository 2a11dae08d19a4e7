"""Datasets, and batches from them in an order that follows from seed and epoch."""

"""Data that is made: planted truth, synthetic traffic, multi-hot from one-hot."""

"""A training run: state, step, loop, checkpoints, evaluation, and how it is measured."""

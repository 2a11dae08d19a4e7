"""What is flexible: the dense model, its loss, its metrics, its optimizers. Pure functions; no table is in here."""

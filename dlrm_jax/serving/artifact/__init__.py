"""An exported model: written, read, checked and scored; it needs jax and numpy alone."""

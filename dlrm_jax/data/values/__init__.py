"""From the values of a column to numbers; preparation and serving share it."""

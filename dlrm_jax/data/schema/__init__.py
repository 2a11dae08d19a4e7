"""What the columns of a log mean."""

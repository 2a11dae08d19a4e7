"""A schema guessed from a log's first rows, with the reasons."""

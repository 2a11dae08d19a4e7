"""Raw log to prepared dataset, in two passes."""

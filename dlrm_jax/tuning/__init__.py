"""Search over the flags of a run: which trials there are, how far each goes, and which is the best."""

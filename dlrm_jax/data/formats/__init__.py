"""Readers: files of every format as chunks of rows."""

"""Lookup and update of tables by other means than XLA, a kernel each: `--kernels`. Pallas on GPUs, C++ on CPUs."""

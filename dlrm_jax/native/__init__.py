"""Lookup and update of tables by C++ on CPUs, as an option: --cpu_kernels=native."""

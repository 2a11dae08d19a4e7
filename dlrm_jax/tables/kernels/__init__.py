"""Lookup and update of tables, and a whole model's score, by C++ on CPUs, as an option: --cpu_kernels=native."""

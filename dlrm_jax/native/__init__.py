"""Tables' lookup and update, and an exported model's score, by C++ on CPUs, as an option: --cpu_kernels=native."""

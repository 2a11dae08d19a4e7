"""What a user would pick instead, in as few lines as it takes: compare_peers.py holds them against dlrm_jax."""

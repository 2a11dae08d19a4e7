"""DLRM in JAX. Read in this order: config, batch, model, step, embedding, sparse_optimizer, loop."""

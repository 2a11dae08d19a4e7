"""Data: raw log -> prepared dataset, or Dataset in memory -> batches. Modules here import no JAX unless they batch."""

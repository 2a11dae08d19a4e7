"""How a table is spread over a mesh: one file a sharding type."""

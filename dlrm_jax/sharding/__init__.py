"""Placement of tables over a mesh: plans, storage, exchange, and what they cost."""

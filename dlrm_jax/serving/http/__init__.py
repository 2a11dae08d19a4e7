"""The server: requests, batches, versions, and what it says of itself."""

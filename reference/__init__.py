"""The reference solutions, one module per day."""

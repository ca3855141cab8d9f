"""Networks: soft modularization and its baselines."""

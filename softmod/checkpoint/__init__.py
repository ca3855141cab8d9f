"""A run's state on disk: saved whole, verified, restored; policies read from it."""

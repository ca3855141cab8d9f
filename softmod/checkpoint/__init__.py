"""Checkpoints: write, verify and restore a run's state; load trained policies."""

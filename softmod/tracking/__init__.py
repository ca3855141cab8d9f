"""Tracking: the journal of a run, its terminal output, and the upload of the journal to MLflow."""

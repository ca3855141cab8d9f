"""What a run reports: the journal first, the terminal, MLflow from the journal."""

"""Workers, which step the environments with a frozen policy while the learner updates."""

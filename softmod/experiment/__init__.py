"""One run's life: find its folder, build its parts, train, conclude."""

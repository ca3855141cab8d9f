"""Run an experiment: find its folder, build its parts, train, publish the results."""

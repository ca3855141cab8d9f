"""Benchmarks of `make bench`: ratios of rates, measured alternately in one process."""

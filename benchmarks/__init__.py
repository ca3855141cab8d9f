"""What `make bench` measures: ratios of rates taken in one run, alternating, with their spread."""

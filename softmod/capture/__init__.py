"""Record a computation once, repeat it: faster, for several agents at once, in NumPy."""

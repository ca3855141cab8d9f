"""Recording of a computation, and its repetition: with less overhead, batched, or in NumPy."""

"""System services of a run: signals, files, hardware, libraries, fault injection for tests."""

"""What lies under a run: signals, hardware, libraries, faults for tests."""

"""Compose and check a typed configuration from a command line, without heavy imports."""

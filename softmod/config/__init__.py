"""From a command line to a checked, typed configuration; nothing heavy is imported."""

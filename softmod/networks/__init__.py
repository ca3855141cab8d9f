"""The networks: soft modularization and the baselines it is compared with."""

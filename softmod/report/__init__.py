"""`python -m softmod.report`: comparison of many runs, with intervals and published figures."""

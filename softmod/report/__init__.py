"""`python -m softmod.report`: what runs say together, with intervals, beside the
published figures.
"""

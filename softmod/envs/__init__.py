"""Task sets: Meta-World and a toy set.

Their names are in `softmod.envs.tasks`, which imports no simulator.
"""

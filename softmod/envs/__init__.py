"""Task sets: Meta-World's and a toy one.

The names are in `softmod.envs.tasks`, which imports nothing heavy.
"""

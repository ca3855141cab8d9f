"""The imports of the process that workers are forked from.

That process exits without the interpreter's shutdown, which takes seconds with PyTorch loaded.
"""

import atexit
import os

import softmod.workers.worker  # noqa: F401

atexit.register(os._exit, 0)

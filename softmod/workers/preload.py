"""The imports of the process that workers are forked from.

That process exits without the interpreter's shutdown, which takes seconds with PyTorch loaded.
Garbage collections during imports would find nothing and take a quarter of the time.
"""

import atexit
import gc
import os

gc.disable()
import softmod.workers.worker  # noqa: E402, F401

gc.freeze()
gc.enable()
atexit.register(os._exit, 0)

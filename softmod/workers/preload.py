"""The imports of the process that workers are forked from.

That process exits without the interpreter's shutdown, which takes seconds with PyTorch loaded.
Garbage is not collected during the imports: there is none, and looking for it takes a quarter of
their time.
"""

import atexit
import gc
import os

atexit.register(os._exit, 0)
os.environ.pop("PYTHONSAFEPATH", None)  # for this process, not for those that environments start
gc.disable()
try:
    import softmod.workers.worker  # noqa: F401
finally:
    gc.freeze()
    gc.enable()

"""What the process holds that workers are forked from; nobody else imports this.

When the learner is gone it ends at once: taking down an interpreter with PyTorch in it takes
seconds.
"""

import atexit
import os

import softmod.workers.worker  # noqa: F401

atexit.register(os._exit, 0)

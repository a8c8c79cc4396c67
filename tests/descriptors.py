"""What this process has open, for tests of what must not be left behind."""

from __future__ import annotations

import gc
import os


def open_descriptors() -> set[str]:
    """The numbers of all open descriptors.

    What earlier tests left in cycles is collected first: a mapping of theirs has a descriptor, too, and would otherwise
    be closed at some moment between two looks.
    """
    gc.collect()
    return set(os.listdir("/proc/self/fd"))

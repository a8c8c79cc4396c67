"""MemorySprint put together: what the supervisor makes, and what each of its children is made of.

The supervisor makes everything that must outlive a child before it forks the first one: the shared memory, the channels,
the listening sockets, the header chain as it stands in the file. A child builds its own part from these, in the
functions below, each of which is the whole of one process.
"""

from __future__ import annotations

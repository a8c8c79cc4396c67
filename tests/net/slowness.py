"""How much longer things may take: 1, unless the machine is emulated and SPRINT_TEST_SLOWNESS says so (`./run vm`)."""

from __future__ import annotations

import os

SLOWNESS = int(os.environ.get("SPRINT_TEST_SLOWNESS", "1"))
"""Bounds of waiting are multiplied by it. What a test asserts never depends on it."""

"""What every test must leave as it found it: one that pins its process would starve those that come after it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _the_process_stays_as_it_was() -> Iterator[None]:
    before = os.sched_getaffinity(0), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
    yield
    after = os.sched_getaffinity(0), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
    if after != before:
        os.sched_setaffinity(0, before[0])
        pytest.fail(f"the test left its process with {after} (affinity, policy, niceness) instead of {before}")

"""What every test must leave as it found it: one that pins its process would starve those that come after it.

And what no property test may depend on: hypothesis holds each example against 200 ms, and fails on a machine that just
then had something else to do.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

settings.register_profile(
    "any machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _the_process_stays_as_it_was() -> Iterator[None]:
    before = os.sched_getaffinity(0), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
    yield
    after = os.sched_getaffinity(0), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
    if after != before:
        os.sched_setaffinity(0, before[0])
        pytest.fail(f"the test left its process with {after} (affinity, policy, niceness) instead of {before}")

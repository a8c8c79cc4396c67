"""What the kernel that this runs on can do for the product, tried as sprint doctor does; for the throw-away machine.

Prints a line of the report. The rungs that a capture climbs to come from the tests, which record them as properties.
"""

from __future__ import annotations

from typing import Any

from vagrant import reports
from xdp import features
from xdp.features import Feature

ATTEMPTS = 10
"""Of trials that have a time limit: emulated, the first has modules to load, and may run out of it."""
_FEATURES = {"live_frames": Feature.LIVE_FRAMES, "tcx": Feature.TCX, "ring_buffer": Feature.RING_BUFFER}


def main() -> None:
    """All of it."""
    for _ in range(ATTEMPTS):
        probes = {probe.feature: probe for probe in features.probe_all()}
        if all(probe.available is not None for probe in probes.values()):
            break
    said: dict[str, Any] = {name: probes[feature].available for name, feature in _FEATURES.items()}
    said["lacks"] = {probe.feature.value: probe.detail for probe in probes.values() if not probe.available}
    print(reports.line(facts=said))  # noqa: T201 - the report is this program's output


if __name__ == "__main__":
    main()

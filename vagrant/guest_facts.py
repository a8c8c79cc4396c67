"""What the product can do on the kernel that this runs on, tried with its own code; for the throw-away machine.

The rungs are those that a capture climbs to, on a veth pair and on the machine's virtio NIC, proven by the self-test
packet; the rest is what sprint doctor tries. Prints lines of a report.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from vagrant import reports
from xdp import features, loader
from xdp.attachment import AttachError, attach
from xdp.features import Feature

_FEATURES = {"live_frames": Feature.LIVE_FRAMES, "tcx": Feature.TCX, "ring_buffer": Feature.RING_BUFFER}
_REGTEST_MAGIC, _REGTEST_PORT = bytes.fromhex("fabfb5da"), 18444


def rung(loaded: loader.Loaded, name: str) -> str:
    """The mode that a capture gets on that interface, and why it is no better one."""
    with IPRoute(groups=0) as route:
        route.link("set", index=socket.if_nametoindex(name), state="up")
    try:
        with attach(loaded, name) as attachment:
            return attachment.mode if attachment.reason is None else f"{attachment.mode} ({attachment.reason})"
    except AttachError as error:
        return f"none ({error})"


def main() -> None:
    """All of them, each said as soon as it is known."""
    probes = {probe.feature: probe for probe in features.probe_all()}
    said: dict[str, Any] = {name: bool(probes[feature].available) for name, feature in _FEATURES.items()}
    said["features"] = {probe.feature.value: probe.detail for probe in probes.values() if not probe.available}
    print(reports.line(facts=said), flush=True)  # noqa: T201 - the report is this program's output
    with IPRoute(groups=0) as route:
        route.link("add", ifname="facts0", kind="veth", peer={"ifname": "facts1", "state": "up"})
    began = time.monotonic()
    with loader.load(_REGTEST_MAGIC, [_REGTEST_PORT], timeout_s=300) as loaded:
        rungs: dict[str, Any] = {"load_s": round(time.monotonic() - began, 1), "veth": rung(loaded, "facts0")}
        nic = os.environ.get("SPRINT_TEST_NIC")
        if nic:
            rungs["virtio_net"] = rung(loaded, nic)
    print(reports.line(facts=rungs), flush=True)  # noqa: T201 - likewise
    with IPRoute(groups=0) as route:
        route.link("del", index=socket.if_nametoindex("facts0"))


if __name__ == "__main__":
    main()

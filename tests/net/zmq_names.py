"""A child of test_zmq_names: source zmq where names are resolved by files and a name server of the test's own.

Run in a mount namespace of its own: `unshare --mount python -m tests.net.zmq_names KIND FOLDER`. Prints what it heard,
and exits at once, for libzmq waits for a resolver that doesn't answer.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from sprint.addresses import Address
from sprint.sources.zmq import ZmqSource
from sprint.status import StatusBlock
from tests.unit.sources.test_zmq import BLOCKS, GENESIS, CorePublisher, Listener

SILENT_SERVER = "127.0.0.9"
NOBODY = "127.0.0.8"


def resolve_by(folder: Path, hosts: str, server: str) -> None:
    """From now on this process resolves names in its own way."""
    for name, text in (("hosts", hosts), ("resolv.conf", f"nameserver {server}\noptions timeout:30 attempts:5\n")):
        (folder / name).write_text(text)
        subprocess.run(["mount", "--bind", str(folder / name), f"/etc/{name}"], check=True)


def hear(core: CorePublisher, *nodes: Address) -> None:
    """Wait until a source of these nodes is subscribed at the publisher, and hears what it says; that ends this."""
    status = StatusBlock.create(1, {})
    one = Listener(ZmqSource(nodes, lambda: GENESIS, status))
    core.wait_for_subscriptions(2, one.hurry)
    core.send(b"hashblock", BLOCKS[0].hash[::-1])
    (heard,) = one.wait_for(1)
    print(type(heard).__name__, flush=True)
    os._exit(0)


def main(kind: str, folder: Path) -> None:
    if kind == "ipv6":
        resolve_by(folder, "::1 six.test\n", NOBODY)
        core = CorePublisher("[::1]")
        hear(core, Address("six.test", core.port))
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind((SILENT_SERVER, 53))
            resolve_by(folder, "", SILENT_SERVER)
            core = CorePublisher()
            hear(core, Address("nobody-knows.test", 1234), core.address)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""The UDP worker of `bench end-to-end`: the product's half of the fan-out that says who is served, and nothing else.

Ten thousand sessions aren't opened, nor as many addresses proven: subscribers are put where the product puts those who
have done so, and are looked after as there: routes, neighbours, and proofs that the interface can send.
"""

from __future__ import annotations

import select
import socket
import time
from typing import TYPE_CHECKING

from sprint.addresses import Address
from sprint.bench.fanout_sink import FIRST_PORT, SOURCE_PORT
from sprint.bench.fanout_wire import address_of
from sprint.deliveries.udp_fanout import WorkerFanout
from sprint.tiers import Tier

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from sprint.bench.end_to_end_product import Product

_TICK_S = 0.5


def be_worker(control: Connection, product: Product, enterprise: int, subscribers: int) -> None:
    """The process: so many join, the first ones enterprise's; then it looks after them."""
    fanout = WorkerFanout(product.bypass.udp[0], SOURCE_PORT, product.log)
    for number in range(subscribers):
        address = Address(socket.inet_ntoa(address_of(number)), FIRST_PORT + number)
        tier = Tier.ENTERPRISE if number < enterprise else Tier.TURBO
        fanout.join(number.to_bytes(4, "big"), address, tier)
    udp = product.status.layout.udp
    udp.fanout_enterprise, udp.fanout_turbo = enterprise, subscribers - enterprise
    control.send(True)
    while True:
        select.select([fanout.fileno()], [], [], _TICK_S)
        fanout.look(time.monotonic_ns())

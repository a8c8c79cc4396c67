"""The product with the kernel bypass on a link of the test's own, and what it says of what it captured.

The product is in the namespace that the calling thread is in: enter it first, and be in it to ask the API.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.real.children import QUIET
from tests.real.product import COMPILED_WITHIN_S, Product

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.real.product import Event

WAYS = {"capture ringbuf", "capture af_xdp"}
"""Both backends, as sightings name them."""


@contextmanager
def captured(folder: Path, interface: str, *nodes: str, **settings: str) -> Iterator[Product]:
    """Healthy, its bypass active, its relay reading the capture."""
    bypass = {"ENABLE_KERNEL_BYPASS": "true", "INTERFACE": interface, **QUIET, **settings}
    with Product(folder, *nodes, tier="enterprise", **bypass) as product:
        product.wait_until_healthy()
        product.wait_for(
            "turbo-status",
            lambda answer: answer["kernelBypass"]["active"],
            "that the bypass is active",
            COMPILED_WITHIN_S,
        )
        product.wait_for_log("Capture at work")
        yield product


def ingest(product: Product) -> Event:
    """`kernelBypass.ingest` of /api/turbo-status."""
    counted: Event = product.ask("turbo-status")["kernelBypass"]["ingest"]
    return counted


def ways_to(product: Product, block_hash: str) -> set[str]:
    """By whom this block has been announced so far, as its timeline in /api/blocks has it."""
    blocks = product.ask("blocks?limit=64")["blocks"]
    return {mark["peer"] for block in blocks if block["hash"] == block_hash for mark in block["timeline"]}


def wait_until_captured(product: Product, block_hash: str, timeout_s: float = 5.0) -> None:
    """Wait until both backends have told of this block."""
    product.wait_for(
        "blocks?limit=64",
        lambda _: ways_to(product, block_hash) >= WAYS,
        f"{block_hash} by {' and '.join(sorted(WAYS))}",
        timeout_s,
    )

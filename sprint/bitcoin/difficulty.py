"""Which nBits, which version and which time a network demands of the block after a given one.

Pure rules over figures; the chain supplies the ancestors. They are consensus, quirks included: a retarget measures
2,015 spacings, not 2,016, because the period's first block is compared with its last. Sources: Bitcoin Core's pow.cpp
and validation.cpp, BIP34, BIP65, BIP66, BIP94.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sprint.bitcoin.block import encode_compact_target, target_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprint.bitcoin.networks import Network

MEDIAN_SPAN = 11
"""A block's time must exceed the median of that many ancestors' times."""
MAX_FUTURE_S = 2 * 3600
"""A block this far ahead of our clock is refused until the clock has caught up."""
MAX_TIMEWARP_S = 600
"""BIP94: a period's first block lies at most this far before its parent."""
MAX_CORRECTION = 4
"""One retarget changes the target by no more than this factor."""

_TIME = slice(68, 72)
_BITS = slice(72, 76)


def header_time(header: bytes) -> int:
    """Unix seconds, 32 bits."""
    return int.from_bytes(header[_TIME], "little")


def header_bits(header: bytes) -> int:
    """nBits as the header states them."""
    return int.from_bytes(header[_BITS], "little")


def bits_depend_on_time(network: Network) -> bool:
    """Whether a block's own time may change the nBits it must carry (testnet3 and testnet4)."""
    return network.allow_min_difficulty and not network.no_retargeting


def retarget(network: Network, base_bits: int, first_time: int, last_time: int) -> int:
    """nBits of a new period, from the times of the first and the last block of the one before."""
    timespan = network.target_timespan
    elapsed = max(timespan // MAX_CORRECTION, min(timespan * MAX_CORRECTION, last_time - first_time))
    return encode_compact_target(min(network.pow_limit, target_of(base_bits) * elapsed // timespan))


def regular_bits(network: Network, height: int, ancestor: Callable[[int], bytes]) -> int:
    """nBits of the last block below `height`, in the period of its parent, that isn't the 20-minute rule's exception.

    May walk back a whole period; whoever goes upwards carries the answer along.
    """
    at = height - 1
    bits = header_bits(ancestor(at))
    while bits == network.pow_limit_bits and at % network.interval:
        at -= 1
        bits = header_bits(ancestor(at))
    return bits


def required_bits(
    network: Network, height: int, time: int | None, ancestor: Callable[[int], bytes], regular: int | None = None
) -> int:
    """nBits that the block of `height` and `time` must carry; `ancestor(h)` is its branch's 80-byte header at h.

    With `time` None the block isn't known yet: 0 where its nBits depend on its time. `regular` is what `regular_bits`
    says, if it is known already. `height` is above 0.
    """
    if network.no_retargeting:
        return network.pow_limit_bits
    parent = ancestor(height - 1)
    if height % network.interval == 0:
        first = ancestor(height - network.interval)
        # BIP94 starts from the period's first block, which never has the 20-minute rule's exception.
        base = first if network.bip94 else parent
        return retarget(network, header_bits(base), header_time(first), header_time(parent))
    if not network.allow_min_difficulty:
        return header_bits(parent)
    if time is None:
        return 0
    if time > header_time(parent) + 2 * network.target_spacing:
        return network.pow_limit_bits
    return regular_bits(network, height, ancestor) if regular is None else regular


def minimum_version(network: Network, height: int) -> int:
    """The lowest block version allowed at this height; versions are signed."""
    if height >= network.bip65_height:
        return 4
    if height >= network.bip66_height:
        return 3
    return 2 if height >= network.bip34_height else -(1 << 31)


def version_heights(network: Network) -> tuple[int, int, int]:
    """The heights at which `minimum_version` changes."""
    return network.bip34_height, network.bip66_height, network.bip65_height


def earliest_time(network: Network, height: int, parent_time: int) -> int:
    """BIP94's bar: the earliest time a block of this height may have, whatever its median says."""
    return parent_time - MAX_TIMEWARP_S if network.bip94 and height % network.interval == 0 else 0


def median_time(times: list[int]) -> int:
    """The median of up to 11 times; of an even number the upper middle one, as Core takes it."""
    return sorted(times)[len(times) // 2]

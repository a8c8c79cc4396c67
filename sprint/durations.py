"""Durations as operators write them and as the API shows them: `500µs`, `200ms`, `1.5s`. Pure; nanoseconds inside."""

from __future__ import annotations

import re
from typing import Final

_UNITS: Final = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,  # U+00B5, what keyboards type
    "μs": 1_000,  # U+03BC, what Unicode normalisation makes of it
    "ms": 1_000_000,
    "s": 1_000_000_000,
}
_SHOWN: Final = (("s", 1_000_000_000), ("ms", 1_000_000), ("µs", 1_000), ("ns", 1))
_DURATION: Final = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,9}))?\s*([^\W0-9]{1,2})")


def parse_duration(text: str) -> int:
    """Nanoseconds of `500us`, `500µs`, `200ms`, `1.5s`, `2 s`; a unit is required.

    Raises ValueError for anything else: a sign, an exponent, no unit, or parts of a nanosecond.
    """
    match = _DURATION.fullmatch(text.strip())
    unit = _UNITS.get(match[3]) if match else None
    if match is None or unit is None:
        raise ValueError(f"duration {text[:32]!r}: expected a number and one of ns, us, µs, ms, s")
    whole, fraction = match[1], match[2] or ""
    scaled = int(whole + fraction) * unit
    divisor: int = 10 ** len(fraction)
    if scaled % divisor:
        raise ValueError(f"duration {text[:32]!r}: finer than a nanosecond")
    return scaled // divisor


def format_duration(ns: int) -> str:
    """The duration in the largest unit that leaves at least 1: `500µs`, `1.5s`, `0s`.

    Exact: parse_duration() of it gives `ns` again. Raises ValueError for a negative one.
    """
    if ns < 0:
        raise ValueError(f"duration of {ns} ns: expected 0 or more")
    for name, unit in _SHOWN:
        if ns >= unit:
            whole, rest = divmod(ns, unit)
            digits = len(str(unit)) - 1
            fraction = f"{rest:0{digits}d}".rstrip("0") if rest else ""
            return f"{whole}.{fraction}{name}" if fraction else f"{whole}{name}"
    return "0s"

"""The five tiers: the guide's table, and what a delivery does when a subscriber can't take a block in time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

NS_PER_US = 1_000
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


class Tier(IntEnum):
    """Ordered: a higher tier is served first."""

    FREE = 0
    PRO = 1
    BUSINESS = 2
    TURBO = 3
    ENTERPRISE = 4

    @property
    def label(self) -> str:
        """The tier's name as operators write it: `turbo`."""
        return self.name.lower()

    @classmethod
    def from_label(cls, label: str) -> Tier:
        """The tier of that name. Raises KeyError for an unknown one."""
        return cls[label.strip().upper()]


class SlowReader(Enum):
    """What happens to a block for a subscriber whose socket is still unwritable at its write deadline."""

    DROP = "drop"
    """That block is dropped for that subscriber, who is told."""
    OVERWRITE = "overwrite"
    """The newest block replaces older ones still waiting: the latest is never missed."""


@dataclass(frozen=True, slots=True)
class TierProfile:
    """One row of the guide's table."""

    tier: Tier
    relay_target_ns: int
    """Arrival of the announcement → record handed to the kernel for a subscriber of this tier."""
    relay_goal_ns: int | None
    write_deadline_ns: int
    """From the start of one subscriber's write."""
    ring_slots: int
    slow_reader: SlowReader
    feature: str
    """The guide's word for what the tier offers."""

    @property
    def memory_engine(self) -> bool:
        """Turbo and enterprise run in shared memory."""
        return self.tier >= Tier.TURBO


PROFILES: dict[Tier, TierProfile] = {
    profile.tier: profile
    for profile in (
        TierProfile(Tier.FREE, 500 * NS_PER_MS, None, 2 * NS_PER_S, 512, SlowReader.DROP, "Basic TCP relay"),
        TierProfile(Tier.PRO, 100 * NS_PER_MS, None, 1_500 * NS_PER_MS, 1_280, SlowReader.DROP, "Enhanced relay"),
        TierProfile(Tier.BUSINESS, 50 * NS_PER_MS, None, 1 * NS_PER_S, 1_536, SlowReader.DROP, "Priority processing"),
        TierProfile(
            Tier.TURBO,
            10 * NS_PER_MS,
            5 * NS_PER_MS,
            500 * NS_PER_US,
            2_048,
            SlowReader.OVERWRITE,
            "Shared memory + zero-copy",
        ),
        TierProfile(
            Tier.ENTERPRISE,
            5 * NS_PER_MS,
            2 * NS_PER_MS,
            200 * NS_PER_US,
            4_096,
            SlowReader.OVERWRITE,
            "Kernel bypass + dedicated infra",
        ),
    )
}

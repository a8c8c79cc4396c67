"""What the API says, worked out of the status block: plain dicts, ready for JSON.

Nothing here opens a socket or reads a clock: the two clocks' times are arguments. Names are the record's
(`docs/wire-format.md`); a time difference carries its unit, `_us` or `_seconds`; what isn't known is null, never 0.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from sprint.errors import RemoteProtocolError
from sprint.events import Announcement, Source, State
from sprint.histograms import quantile_ns
from sprint.ledger import REJECT_INDEX
from sprint.record import MAGIC, decode, state_names
from sprint.status import BLOCKS, MARKS
from sprint.tiers import NS_PER_S, NS_PER_US, Tier

if TYPE_CHECKING:
    from sprint.histograms import HistogramData
    from sprint.status import BlockRow, Delivery, Mark, Peer, StatusBlock, TierAccounts

HEARTBEAT_LIMIT_NS = 3 * NS_PER_S
"""The relay turns at least once a second; three missed turns mean that it hangs or is gone."""
_NO_UPSTREAMS = {Source.CAPTURE, Source.ZMQ}
"""They can't be asked for headers."""
SOURCES = {int(source): source.name.lower() for source in Source}
ANNOUNCEMENTS = {int(announcement): announcement.name.lower() for announcement in Announcement}


def health(status: StatusBlock, monotonic_ns: int, wall_ns: int) -> dict[str, Any]:
    """How this instance fares: `status` is "ok", or "unhealthy" with one line for each of its `problems`.

    `warnings` are what is wrong without keeping any block from being relayed.
    """
    facts, relay, peers = status.facts, status.relay, status.peers()
    connected = sum(1 for peer in peers if peer.connected and peer.source not in _NO_UPSTREAMS)
    heartbeat_ns = int(relay.heartbeat_ns)
    age_ns = max(0, monotonic_ns - heartbeat_ns)
    problems = []
    if not heartbeat_ns:
        problems.append("relay: has not begun its first turn")
    elif age_ns > HEARTBEAT_LIMIT_NS:
        problems.append(
            f"relay: last turn {age_ns / NS_PER_S:.1f} s ago, expected within {HEARTBEAT_LIMIT_NS // NS_PER_S} s"
        )
    if not connected:
        names = ", ".join(facts["bitcoinNodes"])
        problems.append(f"upstreams: none connected of {names}")
    if not relay.caught_up:
        problems.append(
            f"header chain: at height {relay.tip_height}, not caught up with an upstream; nothing is published before"
        )
    missing = [_text(row.name) for row in status.layout.processes if row.name and not row.pid]
    if missing:
        problems.append(f"processes: being restarted: {', '.join(missing)}")
    starting = _starting(status)
    if starting:
        problems.append(f"processes: not serving yet: {', '.join(starting)}")
    return {
        "status": "unhealthy" if problems else "ok",
        "problems": problems,
        "warnings": [line for peer in peers if (line := _publisher_warning(peer))],
        "version": facts["version"],
        "engine": facts["engine"],
        "tier": facts["tier"],
        "network": facts["network"],
        "tip_height": int(relay.tip_height),
        "caught_up": bool(relay.caught_up),
        "sequence": int(relay.sequence),
        "session": f"{status.layout.session:016x}",
        "uptime_seconds": round(max(0, wall_ns - status.layout.started_wall_ns) / NS_PER_S, 3),
        "heartbeat_age_seconds": round(age_ns / NS_PER_S, 3) if heartbeat_ns else None,
        "upstreams_connected": connected,
        "subscribers": _subscribers(status),
        "processes": [
            {"name": _text(row.name), "pid": int(row.pid) or None, "restarts": int(row.restarts)}
            for row in status.layout.processes
            if row.name
        ],
        "optimizations": [
            {"name": _text(row.name), "applied": bool(row.applied), "detail": _text(row.detail)}
            for row in status.layout.steps
            if row.name
        ],
        "rejected": {reason.value: int(relay.rejected[index]) for reason, index in REJECT_INDEX.items()},
    }


def _starting(status: StatusBlock) -> list[str]:
    """Whose process runs and whose subscribers aren't served yet, or not by a successor."""
    serving = {_text(delivery.name): int(delivery.pid) for delivery in status.deliveries()}
    rows = [(_text(row.name), int(row.pid)) for row in status.layout.processes if row.name and row.pid]
    return [name for name, pid in rows if serving.get(name, pid) != pid]


def _publisher_warning(peer: Peer) -> str | None:
    """What is wrong with a ZMQ publisher: blocks still come by the other sources, so it is no problem of ours."""
    if peer.source != Source.ZMQ:
        return None
    if not peer.connected:
        return f"zmq {_text(peer.name)}: not connected: {_text(peer.last_error) or 'no answer yet'}"
    if peer.silent_ns:
        age_s = peer.silent_ns // NS_PER_S
        return f"zmq {_text(peer.name)}: silent: the best block has been known from others for {age_s} s"
    return None


def _subscribers(status: StatusBlock) -> dict[str, int]:
    deliveries = status.deliveries()
    return {tier.label: sum(int(delivery.tiers[tier].subscribers) for delivery in deliveries) for tier in Tier}


def sources(status: StatusBlock) -> dict[str, Any]:
    """Each upstream: who was first how often, and by how much."""
    return {"sources": [_source(peer) for peer in status.peers()]}


def _source(peer: Peer) -> dict[str, Any]:
    return {
        "name": _text(peer.name),
        "source": SOURCES.get(peer.source),
        "connected": bool(peer.connected),
        "agent": _text(peer.agent) or None,
        "high_bandwidth": bool(peer.high_bandwidth),
        "height": int(peer.height),
        "sightings": int(peer.sightings),
        "first": int(peer.first),
        "mean_lead_us": _mean_us(peer.lead_ns, peer.leads),
        "mean_behind_us": _mean_us(peer.behind_ns, peer.behinds),
        "rtt_us": peer.rtt_ns / NS_PER_US if peer.rtt_ns else None,
        "connects": int(peer.connects),
        "failures": int(peer.failures),
        "skipped_messages": int(peer.skipped_messages),
        "lost_messages": int(peer.lost_messages),
        "silent_seconds": peer.silent_ns / NS_PER_S if peer.silent_ns else None,
        "bytes_received": int(peer.bytes_received),
        "last_error": _text(peer.last_error) or None,
    }


def deliveries(status: StatusBlock) -> dict[str, Any]:
    """What each delivery did for the subscribers of each tier."""
    return {"deliveries": [_delivery(delivery) for delivery in status.deliveries()], "udp": _udp(status)}


UDP_COUNTERS = ("challenges", "suppressed", "refused", "unknown", "garbage", "full", "lapsed", "unproven")


def _udp(status: StatusBlock) -> dict[str, Any]:
    """What the UDP side refused and ended, and how its subscribers are served."""
    udp, egress = status.layout.udp, status.layout.egress
    return {
        **{name: int(getattr(udp, name)) for name in UDP_COUNTERS},
        "rung": _text(udp.rung) or None,
        "reason": _text(udp.reason) or None,
        "by_live_frames": int(udp.fanout_turbo + udp.fanout_enterprise),
        "runs": int(egress.runs),
    }


def _delivery(delivery: Delivery) -> dict[str, Any]:
    return {
        "name": _text(delivery.name),
        **{name: int(getattr(delivery, name)) for name in ("accepted", "refused", "disconnected", "heartbeats")},
        "bytes_sent": int(delivery.bytes_sent),
        "processing_p50_us": _quantile_us(delivery.processing, 0.5),
        "processing_p99_us": _quantile_us(delivery.processing, 0.99),
        "tiers": {tier.label: _tier_accounts(delivery.tiers[tier]) for tier in Tier},
    }


TIER_COUNTERS = (
    *("subscribers", "on_time", "late", "dropped", "overwritten", "replayed", "repaired", "lost_notices"),
    "over_target",
    *("buffer_used", "buffer_used_max"),
)


def _tier_accounts(accounts: TierAccounts) -> dict[str, Any]:
    return {
        **{name: int(getattr(accounts, name)) for name in TIER_COUNTERS},
        "relay_p50_us": _quantile_us(accounts.relay_latency, 0.5),
        "relay_p99_us": _quantile_us(accounts.relay_latency, 0.99),
        "write_p50_us": _quantile_us(accounts.write_time, 0.5),
        "write_p99_us": _quantile_us(accounts.write_time, 0.99),
    }


def _quantile_us(data: HistogramData, share: float) -> float | None:
    ns = quantile_ns(data, share)
    return None if ns is None else ns / NS_PER_US


def blocks(status: StatusBlock, limit: int) -> dict[str, Any]:
    """The newest `limit` blocks, newest first, each with its timeline."""
    names = [_text(row.name) for row in status.layout.peers]
    count = int(status.layout.block_count)
    rows = status.blocks()
    # What the writer began while the rows were copied may have taken the oldest ones' places.
    begun = int(status.layout.block_count) - count
    rows = rows[: max(0, BLOCKS - begun)]
    told = (_block(row, names) for row in rows)
    return {"blocks": list(islice((block for block in told if block is not None), limit))}


def _block(row: BlockRow, names: list[str]) -> dict[str, Any] | None:
    """One block's row; None while there is no record in it yet, or a writer died in the middle of it."""
    encoded = bytes(row.record)
    if row.version & 1 or not encoded.startswith(MAGIC):
        return None
    try:
        record = decode(encoded)
    except RemoteProtocolError:
        return None
    first_ns = int(row.first_seen_ns)
    return {
        **record.as_dict(),
        "state": state_names(State(row.state) if row.state else record.state),
        "sightings": int(row.sightings),
        "first_seen_ns": first_ns,
        "proven_us": _after_us(row.proven_ns, first_ns),
        "published_us": _after_us(row.published_ns, first_ns),
        "validated_us": _after_us(row.validated_ns, first_ns),
        "stale_us": _after_us(row.stale_ns, first_ns),
        "timeline": [_mark(mark, first_ns, names) for mark in row.marks[: min(row.sightings, MARKS)]],
    }


def _mark(mark: Mark, first_ns: int, names: list[str]) -> dict[str, Any]:
    return {
        "peer": (names[mark.peer] or None) if mark.peer < len(names) else None,
        "source": SOURCES.get(mark.source),
        "announcement": ANNOUNCEMENTS.get(mark.announcement),
        "seen_ns": int(mark.seen_ns),
        "after_first_us": _after_us(mark.seen_ns, first_ns),
    }


def _after_us(at_ns: int, first_ns: int) -> float | None:
    return (at_ns - first_ns) / NS_PER_US if at_ns else None


def _mean_us(total_ns: int, count: int) -> float | None:
    return round(total_ns / count / NS_PER_US, 3) if count else None


def _text(field: bytes) -> str:
    """A fixed field's text: a peer chose it, or it was cut in the middle of a letter."""
    return field.decode(errors="replace")

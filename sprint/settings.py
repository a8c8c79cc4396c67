"""Every variable that Sprint reads: its type, what is allowed, its description and its default, named once.

The same table feeds the parser, `sprint run --help` and docs/configuration.md. A parser raises ValueError saying what
was expected; sprint/config.py names the variable and shows the value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sprint.addresses import Address, parse_address
from sprint.bitcoin.networks import NETWORKS
from sprint.durations import format_duration, parse_duration
from sprint.ring import MAX_SLOTS, MIN_SLOTS
from sprint.tiers import NS_PER_S, NS_PER_US, PROFILES, Tier, TierProfile

MAX_UPSTREAMS = 16
CAPTURES = ("af_xdp", "ringbuf")
MAX_INTERFACES = 8
"""Each one's state has to fit into the status block, and each costs every packet on it some 20 ns."""
MAX_CONNECTIONS = 1_000_000
MAX_PUBLISHERS = 8
ZMQ_PROOFS = ("node", "header")
MAX_WORKERS = 8
"""The status block has room for them, and a ninth core is better spent on another instance."""
MIN_WRITE_DEADLINE_NS = 10 * NS_PER_US
"""About the cost of one TCP send: a shorter deadline can't be met by anybody."""
MAX_WRITE_DEADLINE_NS = 60 * NS_PER_S

_TIER_NAMES = ", ".join(tier.label for tier in Tier)
_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


def _tier(value: Any) -> Tier:
    try:
        return Tier.from_label(str(value))
    except KeyError:
        raise ValueError(f"expected one of {_TIER_NAMES}") from None


def _switch(value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in _TRUE | _FALSE:
        raise ValueError("expected true or false")
    return text in _TRUE


def _write_deadline(value: Any) -> int:
    try:
        duration_ns = parse_duration(str(value))
    except ValueError:
        raise ValueError("expected a duration such as 500us, 200ms or 1.5s") from None
    if not MIN_WRITE_DEADLINE_NS <= duration_ns <= MAX_WRITE_DEADLINE_NS:
        low, high = format_duration(MIN_WRITE_DEADLINE_NS), format_duration(MAX_WRITE_DEADLINE_NS)
        raise ValueError(f"expected {low} to {high}")
    return duration_ns


def _slots(value: Any) -> int:
    text = str(value).strip()
    if not re.fullmatch(r"\d{1,8}", text, re.ASCII) or not MIN_SLOTS <= int(text) <= MAX_SLOTS:
        raise ValueError(f"expected a whole number from {MIN_SLOTS} to {MAX_SLOTS}")
    return int(text)


def _network(value: Any) -> str:
    name = str(value).strip().lower()
    if name not in NETWORKS:
        raise ValueError(f"expected one of {', '.join(NETWORKS)}")
    return name


def _nodes(value: Any) -> tuple[str, ...]:
    nodes = tuple(part.strip() for part in str(value).split(","))
    if not 1 <= len(nodes) <= MAX_UPSTREAMS:
        raise ValueError(f"expected 1 to {MAX_UPSTREAMS} addresses, separated by commas")
    for node in nodes:
        parse_address(node, default_port=1)
    return nodes


def _publishers(value: Any) -> tuple[Address, ...]:
    nodes = tuple(parse_address(part.strip()) for part in str(value).split(","))
    if len(nodes) > MAX_PUBLISHERS or len(set(nodes)) < len(nodes):
        raise ValueError(f"expected 1 to {MAX_PUBLISHERS} addresses, separated by commas, each once")
    return nodes


def _zmq_proof(value: Any) -> str:
    proof = str(value).strip().lower()
    if proof not in ZMQ_PROOFS:
        raise ValueError(f"expected {' or '.join(ZMQ_PROOFS)}")
    return proof


def _bind(value: Any) -> Address:
    return parse_address(str(value), lowest_port=0)


def _path(value: Any) -> Path:
    text = str(value).strip()
    if not text or "$" in text or not text.isprintable():
        raise ValueError("expected a path of printable characters; variables in it are not replaced")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("expected a path; there is no home directory for ~") from None


def _interfaces(value: Any) -> tuple[str, ...]:
    names = tuple(part.strip() for part in str(value).split(","))
    # Linux takes any letter but / and white space, and 15 of them; a comma can't be written here.
    if not all(re.fullmatch(r"[!-.0-9:-~]{1,15}", name, re.ASCII) and name not in (".", "..", "lo") for name in names):
        raise ValueError("expected names of interfaces, separated by commas, and not lo")
    if len(set(names)) < len(names) or len(names) > MAX_INTERFACES:
        raise ValueError(f"expected 1 to {MAX_INTERFACES} interfaces, each once")
    return names


def _capture(value: Any) -> tuple[str, ...]:
    ways = tuple(part.strip().lower() for part in str(value).split(","))
    if len(set(ways)) < len(ways) or not set(ways) <= set(CAPTURES):
        raise ValueError(f"expected {' or '.join(CAPTURES)}, or both with a comma")
    return ways


def _workers(value: Any) -> int:
    text = str(value).strip()
    if not re.fullmatch(r"\d{1,3}", text, re.ASCII) or not 1 <= int(text) <= MAX_WORKERS:
        raise ValueError(f"expected a whole number from 1 to {MAX_WORKERS}")
    return int(text)


def _connections(value: Any) -> int:
    text = str(value).strip()
    if not re.fullmatch(r"\d{1,7}", text, re.ASCII) or not 1 <= int(text) <= MAX_CONNECTIONS:
        raise ValueError(f"expected a whole number from 1 to {MAX_CONNECTIONS}")
    return int(text)


def _log_format(value: Any) -> str:
    name = str(value).strip().lower()
    if name not in ("text", "json"):
        raise ValueError("expected text or json")
    return name


def _per_tier(name: str) -> str:
    values = ", ".join(f"{tier.label} {_default_text(PROFILES[tier], name)}" for tier in Tier)
    return f"the tier's: {values}"


def _default_text(profile: TierProfile, name: str) -> str:
    return format_duration(profile.write_deadline_ns) if name == "write_deadline" else str(profile.ring_slots)


_MEMORY_DEFAULT = "true on turbo and enterprise, else false"


class Settings(BaseModel):
    """One field a variable. `None` means: the tier's or the network's default."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    tier: Annotated[Tier, BeforeValidator(_tier)] = Field(
        Tier.FREE, description=f"The highest tier that this instance serves: {_TIER_NAMES}.", examples=["free"]
    )
    use_shared_memory: Annotated[bool, BeforeValidator(_switch)] | None = Field(
        None,
        description="Run the memory-optimised engine: ring in shared memory, a process for each job.",
        examples=[_MEMORY_DEFAULT],
    )
    use_direct_p2p: Annotated[bool, BeforeValidator(_switch)] | None = Field(
        None,
        description="Have nodes push blocks directly, before they have validated them.",
        examples=[_MEMORY_DEFAULT],
    )
    use_memory_channel: Annotated[bool, BeforeValidator(_switch)] | None = Field(
        None,
        description="Wake its processes through memory (eventfd) instead of a loopback socket.",
        examples=[_MEMORY_DEFAULT],
    )
    optimize_system: Annotated[bool, BeforeValidator(_switch)] | None = Field(
        None,
        description="Pin, lock and prioritise its relay's process, which then polls without sleeping.",
        examples=[_MEMORY_DEFAULT],
    )
    enable_kernel_bypass: Annotated[bool, BeforeValidator(_switch)] = Field(
        False, description="Ask for the kernel bypass; it takes effect on enterprise only.", examples=["false"]
    )
    interface: Annotated[tuple[str, ...], BeforeValidator(_interfaces)] | None = Field(
        None,
        description="The network interfaces whose packets the kernel bypass looks at, separated by commas; never lo.",
        examples=["those that lead to the internet and to BITCOIN_NODE"],
    )
    capture: Annotated[tuple[str, ...], BeforeValidator(_capture)] = Field(
        ("af_xdp", "ringbuf"),
        description="The ways out of the kernel that the bypass uses: af_xdp, ringbuf, or both.",
        examples=["af_xdp,ringbuf"],
    )
    write_deadline: Annotated[int, BeforeValidator(_write_deadline)] | None = Field(
        None, description="How long one subscriber's write may take.", examples=[_per_tier("write_deadline")]
    )
    block_buffer_size: Annotated[int, BeforeValidator(_slots)] | None = Field(
        None, description="How many records the ring holds.", examples=[_per_tier("block_buffer_size")]
    )
    network: Annotated[str, BeforeValidator(_network)] = Field(
        "main", description=f"The Bitcoin network: {', '.join(NETWORKS)}.", examples=["main"]
    )
    bitcoin_node: Annotated[tuple[str, ...], BeforeValidator(_nodes)] | None = Field(
        None,
        description="The nodes to hear from, host:port, separated by commas; several race each other.",
        examples=["127.0.0.1 and the network's port"],
    )
    zmq_node: Annotated[tuple[Address, ...], BeforeValidator(_publishers)] | None = Field(
        None,
        description="Where nodes publish hashblock and rawblock by ZMQ, host:port, separated by commas.",
        examples=["none"],
    )
    api_bind: Annotated[Address, BeforeValidator(_bind)] = Field(
        Address("127.0.0.1", 8080), description="Where the HTTP API listens.", examples=["127.0.0.1:8080"]
    )
    stream_bind: Annotated[Address, BeforeValidator(_bind)] = Field(
        Address("127.0.0.1", 8434), description="Where stream subscribers connect.", examples=["127.0.0.1:8434"]
    )
    udp_bind: Annotated[Address, BeforeValidator(_bind)] = Field(
        Address("127.0.0.1", 8436),
        description="Where UDP records come from, on turbo and enterprise.",
        examples=["127.0.0.1:8436"],
    )
    zmq_bind: Annotated[Address, BeforeValidator(_bind)] = Field(
        Address("127.0.0.1", 28434),
        description="Where Sprint publishes by ZMQ what Bitcoin Core publishes.",
        examples=["127.0.0.1:28434"],
    )
    zmq_proof: Annotated[str, BeforeValidator(_zmq_proof)] = Field(
        "node",
        description="When hashblock and rawblock go out: node, once a node has connected the block; "
        "header, once proven.",
        examples=["node"],
    )
    connections_per_address: Annotated[int, BeforeValidator(_connections)] = Field(
        1024, description="How many stream connections one address (of IPv6, one /64) may have.", examples=["1024"]
    )
    delivery_workers: Annotated[int, BeforeValidator(_workers)] | None = Field(
        None,
        description="How many processes serve stream subscribers in the memory-optimised engine.",
        examples=["one less than the CPUs, at least 1, at most 8"],
    )
    shm_socket: Annotated[Path, BeforeValidator(_path)] | None = Field(
        None,
        description="The Unix socket at which local turbo and enterprise subscribers get the ring itself.",
        examples=["sprint.sock in DATA_DIR"],
    )
    data_dir: Annotated[Path, BeforeValidator(_path)] | None = Field(
        None,
        description="Where headers and subscribers' keys are kept.",
        examples=["/var/lib/sprint as root, else $XDG_DATA_HOME/sprint"],
    )
    log_format: Annotated[str, BeforeValidator(_log_format)] = Field(
        "text", description="Log lines as text, or json.", examples=["text"]
    )


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable, as --help and the documentation show it."""

    name: str
    description: str
    default: str


def variables() -> tuple[Variable, ...]:
    """Every variable that Sprint reads, in the order of Settings."""
    return tuple(
        Variable(name.upper(), field.description or "", str((field.examples or [""])[0]))
        for name, field in Settings.model_fields.items()
    )

"""What the operator asked for: the environment first, then `.env` in the working directory, then the tier's default.

Settings names every variable, once: the same table feeds the parser, `sprint run --help` and docs/configuration.md.
"""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sprint.addresses import Address, parse_address
from sprint.bitcoin.networks import NETWORKS, Network
from sprint.durations import format_duration, parse_duration
from sprint.errors import ConfigError
from sprint.ring import MAX_SLOTS, MIN_SLOTS
from sprint.tiers import NS_PER_S, NS_PER_US, PROFILES, Tier, TierProfile

ENV_FILE = ".env"
MAX_ENV_FILE_SIZE = 65_536
MAX_UPSTREAMS = 16
CAPTURES = ("af_xdp", "ringbuf")
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


def _bind(value: Any) -> Address:
    return parse_address(str(value), lowest_port=0)


def _path(value: Any) -> Path:
    text = str(value)
    if "\0" in text or "$" in text:
        raise ValueError("expected a folder's path; variables in it are not replaced")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("expected a folder's path; there is no home directory for ~") from None


def _interface(value: Any) -> str:
    name = str(value).strip()
    if not re.fullmatch(r"[!-.0-9:-~]{1,15}", name, re.ASCII) or name in (".", "..", "lo"):
        raise ValueError("expected an interface's name, and not lo")
    return name


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
    interface: Annotated[str, BeforeValidator(_interface)] | None = Field(
        None,
        description="The network interface whose packets the kernel bypass looks at; never lo.",
        examples=["the one that leads to the first of BITCOIN_NODE, or from this host to the internet"],
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
    api_bind: Annotated[Address, BeforeValidator(_bind)] = Field(
        Address("127.0.0.1", 8080), description="Where the HTTP API listens.", examples=["127.0.0.1:8080"]
    )
    stream_bind: Annotated[Address, BeforeValidator(_bind)] = Field(
        Address("127.0.0.1", 8434), description="Where stream subscribers connect.", examples=["127.0.0.1:8434"]
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
        description="Where headers are kept.",
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


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration in force: nothing left open."""

    profile: TierProfile
    use_shared_memory: bool
    use_direct_p2p: bool
    use_memory_channel: bool
    optimize_system: bool
    enable_kernel_bypass: bool
    interface: str | None
    capture: tuple[str, ...]
    write_deadline_ns: int
    """For the instance's own tier; lower tiers keep the guide's."""
    ring_slots: int
    network: Network
    upstreams: tuple[Address, ...]
    api_bind: Address
    stream_bind: Address
    delivery_workers: int
    shm_socket: Path
    data_dir: Path
    log_format: str
    warnings: tuple[str, ...] = ()

    @property
    def tier(self) -> Tier:
        """The highest tier that this instance serves."""
        return self.profile.tier

    def write_deadlines_ns(self) -> dict[Tier, int]:
        """The write deadline of each tier: the instance's own as configured, the others as the guide has them."""
        deadlines = {tier: profile.write_deadline_ns for tier, profile in PROFILES.items()}
        deadlines[self.tier] = self.write_deadline_ns
        return deadlines


def load(environ: dict[str, str] | None = None, directory: Path | None = None) -> Config:
    """Read the configuration. Raises ConfigError, one line that names the variable, at the first bad value."""
    environ = dict(os.environ) if environ is None else environ
    from_file, warnings = _read_env_file((directory or Path()) / ENV_FILE)
    raw = {name: value for name, value in _known(from_file).items() if value}
    raw |= {name: value for name, value in _known(environ).items() if value}
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ConfigError(field.upper(), _shown(raw.get(field, "")), message) from None
    names = {name.upper() for name in Settings.model_fields}
    unknown = (
        f"{ENV_FILE}: {_shown(name)} is not a variable of Sprint" for name in from_file if name.upper() not in names
    )
    return _resolve(settings, environ, (*warnings, *unknown))


def _resolve(settings: Settings, environ: dict[str, str], warnings: tuple[str, ...]) -> Config:
    profile = PROFILES[settings.tier]
    network = NETWORKS[settings.network]
    nodes = settings.bitcoin_node or ("127.0.0.1",)
    upstreams = tuple(parse_address(node, default_port=network.port) for node in nodes)
    if len(set(upstreams)) < len(upstreams):  # as a:8333 and a are on main
        raise ConfigError("BITCOIN_NODE", _shown(",".join(nodes)), "expected each address once")

    data_dir = settings.data_dir or _default_data_dir(environ)

    def switch(value: bool | None) -> bool:
        return profile.memory_engine if value is None else value

    return Config(
        profile=profile,
        use_shared_memory=switch(settings.use_shared_memory),
        use_direct_p2p=switch(settings.use_direct_p2p),
        use_memory_channel=switch(settings.use_memory_channel),
        optimize_system=switch(settings.optimize_system),
        enable_kernel_bypass=settings.enable_kernel_bypass,
        interface=settings.interface,
        capture=settings.capture,
        write_deadline_ns=settings.write_deadline or profile.write_deadline_ns,
        ring_slots=settings.block_buffer_size or profile.ring_slots,
        network=network,
        upstreams=upstreams,
        api_bind=settings.api_bind,
        stream_bind=settings.stream_bind,
        delivery_workers=settings.delivery_workers or max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) - 1)),
        shm_socket=settings.shm_socket or data_dir / "sprint.sock",
        data_dir=data_dir,
        log_format=settings.log_format,
        warnings=warnings,
    )


def _known(values: dict[str, str]) -> dict[str, str]:
    spelt = sorted(values.items(), key=lambda item: item[0].isupper())  # TIER counts before tier
    return {name.lower(): value for name, value in spelt if name.lower() in Settings.model_fields}


def _shown(value: str) -> str:
    printable = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in value[:80])
    return printable + ("…" if len(value) > len(printable) else "")


def _read_env_file(path: Path) -> tuple[dict[str, str], list[str]]:
    """The file's names and values, and a warning for each line that is neither; both empty where there is no file."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_ENV_FILE_SIZE + 1)
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        raise ConfigError(ENV_FILE, path, f"can't be read: {error.strerror}") from None
    if len(content) > MAX_ENV_FILE_SIZE:
        raise ConfigError(ENV_FILE, path, f"expected at most {MAX_ENV_FILE_SIZE} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(ENV_FILE, path, f"expected UTF-8 text, which byte {error.start} is not") from None
    lines = list(parse_stream(io.StringIO(text)))
    broken = [line.original.line for line in lines if line.error]
    readable = "".join(line.original.string for line in lines if not line.error)
    # Without interpolation: ${A}${A} could make gigabytes of a small file.
    values = dotenv_values(stream=io.StringIO(readable), interpolate=False)
    warnings = [f"{ENV_FILE}: line {number} can't be read: expected NAME=value" for number in broken]
    return {name: value or "" for name, value in values.items()}, warnings


def _default_data_dir(environ: dict[str, str]) -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/sprint")
    home = environ.get("XDG_DATA_HOME", "")
    if os.path.isabs(home):  # the XDG specification has relative ones ignored
        return Path(home) / "sprint"
    try:
        return Path.home() / ".local" / "share" / "sprint"
    except RuntimeError:
        raise ConfigError("DATA_DIR", "", "expected a folder's path, as this user has no home directory") from None

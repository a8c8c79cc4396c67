"""What the operator asked for: the environment first, then `.env` in the working directory, then the tier's default."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import ValidationError

from sprint.addresses import Address, parse_address
from sprint.bitcoin.networks import NETWORKS, Network
from sprint.errors import ConfigError
from sprint.settings import MAX_WORKERS, Settings
from sprint.tiers import PROFILES, Tier, TierProfile

ENV_FILE = ".env"
MAX_ENV_FILE_SIZE = 65_536
GROUPED = tuple(name for name in ("bitcoin_node", "zmq_node") if name in Settings.model_fields)
"""What may be set for one tier alone, as TURBO_BITCOIN_NODE: instances of several tiers can share one file."""
NAMES = {*Settings.model_fields, *(f"{tier.label}_{name}" for tier in Tier for name in GROUPED)}
"""Every variable's name, in lower case."""


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration in force: nothing left open."""

    profile: TierProfile
    use_shared_memory: bool
    use_direct_p2p: bool
    use_memory_channel: bool
    optimize_system: bool
    enable_kernel_bypass: bool
    interfaces: tuple[str, ...] | None
    """None: those that lead to the upstreams and to the internet."""
    capture: tuple[str, ...]
    write_deadline_ns: int
    """For the instance's own tier; lower tiers keep the guide's."""
    ring_slots: int
    network: Network
    upstreams: tuple[Address, ...]
    api_bind: Address
    stream_bind: Address
    udp_bind: Address
    zmq_nodes: tuple[Address, ...]
    zmq_bind: Address
    zmq_proof: str
    """`node` or `header`."""
    connections_per_address: int
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
    spelt = _choose_group(raw)
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ConfigError(spelt.get(field, field).upper(), _shown(raw.get(field, "")), message) from None
    unknown = (
        f"{ENV_FILE}: {_shown(name)} is not a variable of Sprint" for name in from_file if name.lower() not in NAMES
    )
    return _resolve(settings, environ, (*warnings, *unknown))


def _resolve(settings: Settings, environ: dict[str, str], warnings: tuple[str, ...]) -> Config:
    profile = PROFILES[settings.tier]
    network = NETWORKS[settings.network]
    nodes = settings.bitcoin_node or ("127.0.0.1",)
    upstreams = tuple(parse_address(node, default_port=network.port) for node in nodes)
    if len(set(upstreams)) < len(upstreams):  # as a:8333 and a are on main
        raise ConfigError("BITCOIN_NODE", _shown(",".join(nodes)), "expected each address once")

    if both := set(settings.zmq_node or ()) & set(upstreams):
        raise ConfigError("ZMQ_NODE", str(min(both)), "expected a port of its own, which BITCOIN_NODE hasn't")

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
        interfaces=settings.interface,
        capture=settings.capture,
        write_deadline_ns=settings.write_deadline or profile.write_deadline_ns,
        ring_slots=settings.block_buffer_size or profile.ring_slots,
        network=network,
        upstreams=upstreams,
        api_bind=settings.api_bind,
        stream_bind=settings.stream_bind,
        udp_bind=settings.udp_bind,
        zmq_nodes=settings.zmq_node or (),
        zmq_bind=settings.zmq_bind,
        zmq_proof=settings.zmq_proof,
        connections_per_address=settings.connections_per_address,
        delivery_workers=settings.delivery_workers or max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) - 1)),
        shm_socket=settings.shm_socket or data_dir / "sprint.sock",
        data_dir=data_dir,
        log_format=settings.log_format,
        warnings=warnings,
    )


def _known(values: dict[str, str]) -> dict[str, str]:
    spelt = sorted(values.items(), key=lambda item: item[0].isupper())  # TIER counts before tier
    return {name.lower(): value for name, value in spelt if name.lower() in NAMES}


def _choose_group(raw: dict[str, str]) -> dict[str, str]:
    """Let the tier's own nodes take the place of the common ones; by which name each was given."""
    tier = raw.get("tier", Tier.FREE.label).strip().lower()
    spelt: dict[str, str] = {name: own for name in GROUPED if (own := f"{tier}_{name}") in raw}
    raw |= {name: raw[own] for name, own in spelt.items()}
    return spelt


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
    names = [line.key for line in lines if line.key is not None]
    again = dict.fromkeys(name for number, name in enumerate(names) if name in names[:number])
    warnings += [f"{ENV_FILE}: {_shown(name)} is set more than once: the last one counts" for name in again]
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

"""Each BITCOIN_NODE: does it take us, what is it, and which transport do the connections around it speak.

A node is asked by a connection of our own, as Sprint makes one: v1, closed after the handshake; it takes one of the
node's inbound places for that moment. Whether others' connections are encrypted (BIP324) can't be seen from outside
without looking into packets: the doctor counts those that the capture could hear, and passes on what a running Sprint
has seen of them.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sprint.bitcoin.connection import Connection, ConnectionConfig, PeerViolation, Role
from sprint.bitcoin.messages import NODE_NETWORK, NODE_NETWORK_LIMITED, NODE_WITNESS
from sprint.bitcoin.peer_events import HandshakeCompleted, LatencyMeasured
from sprint.doctor.findings import Finding, Need, State, needs_of
from xdp.interfaces import interface_towards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.addresses import Address
    from sprint.bitcoin.networks import Network
    from sprint.config import Config

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 3.0
"""From the connection on, for handshake and first pong."""
MAX_RECEIVED = 1 << 20
"""A node says a few hundred bytes before its first pong; one that says this much is none."""
NODE_P2P_V2 = 1 << 11
"""BIP324: the node takes the encrypted transport."""
SERVICES = {1 << 2: "bloom", 1 << 6: "compact filters", NODE_P2P_V2: "v2 transport"}
NAMED = {NODE_NETWORK: "network", NODE_WITNESS: "witness", NODE_NETWORK_LIMITED: "network limited", **SERVICES}
V1_REMEDY = "v2transport=0 in the node's bitcoin.conf, and restart it; or rely on the sockets, which speak v1"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node said of itself."""

    protocol: int
    services: int
    user_agent: str
    height: int
    compact: bool
    """It sent `sendcmpct` of version 2."""
    took_ms: float
    """From the first step of connecting to the version message's end of handshake."""
    local: bool
    """It is on this host."""


class Unusable(Exception):  # noqa: N818 - the name is the fact
    """Why a node can't be heard; the remedy with it."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.remedy = remedy


def nodes(config: Config) -> list[Finding]:
    """All at once; one whose name doesn't resolve holds nobody up beyond the time-outs."""
    answers: dict[Address, Answer | Unusable] = {}

    def ask(address: Address) -> None:
        try:
            answers[address] = introduce(address, config.network)
        except Unusable as why:
            answers[address] = why
        except Exception as error:  # one node's surprise is its own line, never the end of the others
            answers[address] = Unusable(f"{type(error).__name__}: {error}", "report this: it is a bug")

    threads = [threading.Thread(target=ask, args=(address,), daemon=True) for address in config.upstreams]
    give_up = time.monotonic() + CONNECT_TIMEOUT_S + ANSWER_TIMEOUT_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, give_up - time.monotonic()))
    silent = Unusable(f"no answer within {CONNECT_TIMEOUT_S + ANSWER_TIMEOUT_S:g} s", _UNREACHABLE)
    told = [(address, answers.get(address, silent)) for address in config.upstreams]
    return judge_nodes(told, config)


_UNREACHABLE = "start the node, or name a reachable one in BITCOIN_NODE; open its port in the firewall"


def introduce(address: Address, network: Network) -> Answer:
    """Connect, shake hands, hang up. Raises Unusable."""
    begun = time.monotonic()
    try:
        with socket.create_connection(address, timeout=CONNECT_TIMEOUT_S) as stream:
            return _shake_hands(stream, network, begun)
    except TimeoutError:
        raise Unusable(f"no connection within {CONNECT_TIMEOUT_S:g} s", _UNREACHABLE) from None
    except (OSError, UnicodeError, OverflowError) as error:
        raise Unusable(getattr(error, "strerror", None) or str(error), _UNREACHABLE) from None


def _shake_hands(stream: socket.socket, network: Network, begun: float) -> Answer:
    config = ConnectionConfig(
        network=network, role=Role.INITIATOR, handshake_timeout_ns=round(ANSWER_TIMEOUT_S * 1_000_000_000)
    )
    connection = Connection(config, secrets.randbits(64), time.monotonic_ns(), int(time.time()))
    give_up = time.monotonic() + ANSWER_TIMEOUT_S
    took_ms: float | None = None
    local = _is_local(stream.getpeername()[0])
    refusal = f"check NETWORK={network.name}, and that this is a node's peer-to-peer port (not RPC or ZMQ)"
    while (left := give_up - time.monotonic()) > 0:
        stream.settimeout(left)
        try:
            stream.sendall(connection.data_to_send())
            data = stream.recv(1 << 14)
        except TimeoutError:
            break
        except OSError as error:
            raise Unusable(f"hung up during the handshake: {error.strerror}", refusal) from None
        if not data:
            if took_ms is not None:
                break
            raise Unusable("hung up without a handshake", f"{refusal}; or it has no place left (maxconnections)")
        try:
            events = connection.receive_data(data, time.monotonic_ns())
        except PeerViolation as violation:
            raise Unusable(f"doesn't speak the protocol: {violation}", refusal) from None
        if took_ms is None and any(isinstance(event, HandshakeCompleted) for event in events):
            took_ms = (time.monotonic() - begun) * 1_000
        # It says sendcmpct before it answers the ping that follows our verack.
        if any(isinstance(event, LatencyMeasured) for event in events) or connection.bytes_received > MAX_RECEIVED:
            break
    version = connection.peer_version
    if version is None or took_ms is None:
        raise Unusable(f"takes connections, but no handshake came within {ANSWER_TIMEOUT_S:g} s", refusal)
    agent = version.user_agent.decode("utf-8", "replace")
    compact = connection.compact_version_agreed == 2
    return Answer(version.version, version.services, agent, version.start_height, compact, took_ms, local)


def _is_local(host: str) -> bool:
    """A connection to an address of this host goes over the loopback."""
    try:
        return interface_towards(host.partition("%")[0]) == "lo"
    except OSError:
        return False


def judge_nodes(told: Sequence[tuple[Address, Answer | Unusable]], config: Config) -> list[Finding]:
    """Several race each other: one that answers is enough for a feed."""
    usable = any(isinstance(answer, Answer) for _, answer in told)
    findings = []
    for address, answer in told:
        if isinstance(answer, Answer):
            findings.append(_judge_answer(address, answer))
            findings.append(judge_transport(address, answer, wanted=Need.BYPASS in needs_of(config)))
        else:
            state = State.DEGRADED if usable else State.MISSING
            findings.append(Finding("node", str(address), state, str(answer), answer.remedy, Need.FEED))
    return findings


def _judge_answer(address: Address, answer: Answer) -> Finding:
    names = [name for bit, name in NAMED.items() if answer.services & bit]
    where = "on this host" if answer.local else "remote"
    found = (
        f"{answer.user_agent}, protocol {answer.protocol}, {where}, at height {answer.height}, "
        f"{', '.join(names) or 'no services'}; v1 handshake in {answer.took_ms:.1f} ms"
    )
    if not answer.compact:
        detail = f"{found}; no compact blocks (BIP152): it announces only what it has validated"
        return Finding("node", str(address), State.DEGRADED, detail, "a node that has them: Bitcoin Core", Need.FEED)
    if not answer.services & (NODE_NETWORK | NODE_NETWORK_LIMITED):
        detail = f"{found}; it serves no blocks"
        remedy = "a full node, by its own default settings, serves blocks"
        return Finding("node", str(address), State.DEGRADED, detail, remedy, Need.FEED)
    return Finding("node", str(address), State.OK, f"{found}, compact blocks", need=Need.FEED)


def judge_transport(address: Address, answer: Answer, *, wanted: bool) -> Finding:
    """What the capture can read of the connections around this node; `wanted`: whether there is to be a capture."""
    check, subject = "transport", str(address)
    if not answer.local:
        detail = "v1 with Sprint; a remote node's other connections don't come by here, so the capture hears only ours"
        return Finding(check, subject, State.OK, detail, need=Need.BYPASS)
    if not answer.services & NODE_P2P_V2:
        return Finding(check, subject, State.OK, "v1 with all its peers: the capture can read them", need=Need.BYPASS)
    detail = "it offers v2 (BIP324): with peers that offer it too its connections are ciphertext, opaque to the capture"
    if not wanted:
        return Finding(check, subject, State.OK, detail, need=Need.BYPASS)
    return Finding(check, subject, State.DEGRADED, detail, V1_REMEDY, Need.BYPASS)

"""A full Bitcoin node by others: bcoin on regtest, as the upstream that the tests in tests/real relay from.

Rules are those of node_process.py; besides, nothing waits for a fixed time, and no node outlives its test, even when
pytest is killed: `node/start.js` ends when the pipe on its standard input does.

What bcoin does that matters to a test:
- It answers getheaders and announces blocks only when synced; a regtest node counts itself synced from height 0.
- Misbehaving peers are banned by address, and here every peer is 127.0.0.1: `clearbanned` by `rpc` forgives them.
- Blocks mined in one second advance the median time by one second each six blocks: 1,000 blocks mined at once end
  about three minutes in the future.
- It tells its peers of a block by cmpctblock (asked for in high-bandwidth mode), headers or inv; it has no ZMQ.
"""

from __future__ import annotations

import hashlib
import http
import json
import os
import secrets
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.real.node_process import POLL_INTERVAL_S, NodeError, NodeProcess, free_ports

if TYPE_CHECKING:
    from collections.abc import Callable

NODE_DIR = Path(__file__).parent / "node"
START_TIMEOUT_S = 60.0  # it takes half a second here; a loaded two-core machine may take many times that
PUBKEYHASH_VERSION = 0x3C  # bcoin's regtest; Core's regtest uses testnet's 0x6f
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class RpcError(Exception):
    """The node refused a call. `code` is bcoin's own (-32601 for an unknown method)."""

    def __init__(self, method: str, code: int, message: str) -> None:
        super().__init__(f"{method}: {message} ({code})")
        self.code = code


def missing() -> str | None:
    """Why no bcoin can be started on this machine, or None."""
    if shutil.which("node") is None:
        return "node (Node.js) is not on PATH: ./run test installs it as root"
    if not (NODE_DIR / "node_modules" / "bcoin" / "bin" / "node").is_file():
        return "bcoin is not installed: ./run test installs it by npm"
    return None


def address_for(label: str) -> str:
    """A regtest address that nobody has the key of, another one for each label."""
    payload = bytes([PUBKEYHASH_VERSION]) + hashlib.sha256(label.encode()).digest()[:20]
    payload += hashlib.sha256(hashlib.sha256(payload).digest()).digest()[:4]
    number, text = int.from_bytes(payload, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = BASE58[digit] + text
    return text


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Ask the node until `condition` holds: RPC has no notification. Raises NodeError naming `what`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise NodeError(f"not within {timeout_s:g} s: {what}")
        time.sleep(POLL_INTERVAL_S)


class BcoinNode(NodeProcess):
    """A regtest node.

    `on_disk` keeps the chain in the node's private folder, so that `restart` can find it again; otherwise it is in
    memory and gone with the process. Heights are ints, hashes are hex in display order (the reverse of P2P bytes).
    """

    def __init__(self, name: str = "bcoin", *, on_disk: bool = False) -> None:
        super().__init__(name)
        self.on_disk = on_disk
        self.p2p_port = 0
        # Two nodes may race for a port: the key tells that the one which answers is ours.
        self._api_key = secrets.token_hex(16)

    @property
    def p2p_address(self) -> str:
        """`host:port`, as BITCOIN_NODE takes it."""
        return f"{self.host}:{self.p2p_port}"

    def start(self) -> None:
        """Start the node and wait until RPC and P2P answer; on its first start also choose its ports.

        Raises NodeError with the node's log if it ends or doesn't answer within a minute.
        """
        if self._process is not None:
            raise NodeError(f"{self.name} is running already")
        choose_ports = self.p2p_port == 0
        for attempts_left in (2, 1, 0):
            if choose_ports:
                self.p2p_port, self.rpc_port = free_ports()
            try:
                self._launch()
            except NodeError as error:
                # A port is free until somebody else takes it: between our look and the node's bind is a gap.
                if not (choose_ports and attempts_left and "EADDRINUSE" in str(error)):
                    raise
            else:
                return

    def stop(self) -> None:
        """End the node as its operator would: it closes its database first."""
        if self.running:
            self.rpc("stop")
        self._wait_for_end()

    def restart(self, *, keep_chain: bool = True, gracefully: bool = True) -> None:
        """Start it again on the same ports. `keep_chain` needs `on_disk`; without it the chain is genesis again."""
        if keep_chain and not self.on_disk:
            raise NodeError(f"{self.name} has its chain in memory: on_disk=True keeps it over a restart")
        if gracefully:
            self.stop()
        else:
            self.kill()
        if not keep_chain:
            shutil.rmtree(self._folder / "chain", ignore_errors=True)
        self.start()

    def rpc(self, method: str, *params: object) -> Any:
        """One JSON-RPC call's result. RpcError if the node refuses, OSError if it isn't there."""
        status, body = self._post("x", self._api_key, method, params)
        if status != http.HTTPStatus.OK:
            raise ConnectionError(f"{self.name}: {method}: HTTP {status}")
        answer = json.loads(body)
        if answer["error"] is not None:
            raise RpcError(method, answer["error"]["code"], answer["error"]["message"])
        return answer["result"]

    def mine(self, count: int, address: str | None = None) -> list[str]:
        """Mine on the node's tip; the new blocks' hashes, lowest first."""
        hashes: list[str] = self.rpc("generatetoaddress", count, address or address_for(self.name))
        return hashes

    def tip(self) -> tuple[int, str]:
        """Height and hash of the best block."""
        info = self.rpc("getblockchaininfo")
        return info["blocks"], info["bestblockhash"]

    def block_hash(self, height: int) -> str:
        value: str = self.rpc("getblockhash", height)
        return value

    def header(self, block_hash: str) -> bytes:
        """The 80 bytes of a block's header."""
        return bytes.fromhex(self.rpc("getblockheader", block_hash, False))

    def raw_block(self, block_hash: str) -> bytes:
        """A whole block as it goes over the wire."""
        return bytes.fromhex(self.rpc("getblock", block_hash, False))

    def submit(self, raw_block: bytes) -> None:
        """Hand the node a block. On a side branch it is kept silently until that branch has the most work."""
        refusal = self.rpc("submitblock", raw_block.hex())
        if refusal is not None and refusal != "inconclusive":
            raise RpcError("submitblock", 0, str(refusal))

    def connect_to(self, other: BcoinNode) -> None:
        """Open a P2P connection to `other` and wait for both handshakes; this node then fetches what it lacks."""
        self.rpc("addnode", other.p2p_address, "onetry")
        wait_until(lambda: self._has_peer(other), f"{self.name} connected to {other.name}")

    def disconnect_from(self, other: BcoinNode) -> None:
        """Close the connection that `connect_to` opened."""
        self.rpc("disconnectnode", other.p2p_address)
        wait_until(lambda: not self._has_peer(other), f"{self.name} disconnected from {other.name}")

    def wait_for_tip(self, block_hash: str, timeout_s: float = 30.0) -> None:
        wait_until(lambda: self.tip()[1] == block_hash, f"{self.name}'s tip {block_hash}", timeout_s)

    def reorganise(self, other: BcoinNode, depth: int) -> tuple[list[str], list[str]]:
        """Make this node lose its last `depth` blocks to a branch that `other` mined, and wait until it has.

        Both must have the same tip at the start and must not be connected. First this node mines `depth` blocks,
        then `other` mines one more than that on the same parent, whose blocks are handed over one by one; the last
        makes this node reorganise. Returns (losers, winners), lowest first; the fork's height is the tip's before.
        """
        if self.tip() != other.tip():
            raise NodeError(f"{self.name} and {other.name} have no common tip: {self.tip()}, {other.tip()}")
        losers = self.mine(depth)
        winners = other.mine(depth + 1)
        for block_hash in winners:
            self.submit(other.raw_block(block_hash))
        self.wait_for_tip(winners[-1])
        return losers, winners

    def _launch(self) -> None:
        node = shutil.which("node")
        if node is None:
            raise NodeError("node (Node.js) is not on PATH")
        options = {
            "network": "regtest",
            "prefix": str(self._folder / "chain"),
            "memory": "false" if self.on_disk else "true",
            "listen": "true",
            "host": self.host,
            "port": str(self.p2p_port),
            "http-host": self.host,
            "http-port": str(self.rpc_port),
            "api-key": self._api_key,
            "no-wallet": "true",
            "workers": "false",
            "log-file": "false",
        }
        (self._folder / "chain").mkdir(exist_ok=True)
        with self._log.open("ab") as log:
            log_from = log.tell()
            self._process = subprocess.Popen(
                [node, "start.js", *(f"--{name}={value}" for name, value in options.items())],
                cwd=NODE_DIR,
                env={k: v for k, v in os.environ.items() if not k.startswith(("BCOIN_", "NODE_"))},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the terminal is for pytest, which then ends the node itself
            )
        try:
            self._wait_until_it_answers(log_from)
        except BaseException:
            self.kill()
            raise

    def _wait_until_it_answers(self, log_from: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.running and time.monotonic() < deadline:
            if self._answers(log_from):
                return
            time.sleep(POLL_INTERVAL_S)
        state = "still starting" if self.running else f"ended ({self._process and self._process.returncode})"
        raise NodeError(f"{self.name} does not answer: {state}\n{self.log_tail()}")

    def _answers(self, log_from: int) -> bool:
        # P2P listens last. Connecting to find out would leave a peer in the node's books, and may meet another process.
        if b"Pool server listening" not in self._log.read_bytes()[log_from:]:
            return False
        try:
            self.rpc("getblockcount")
        except (OSError, RpcError):
            return False
        return True

    def _has_peer(self, other: BcoinNode) -> bool:
        peers = self.rpc("getpeerinfo")
        return any(peer["addr"] == other.p2p_address and peer["version"] > 0 for peer in peers)

"""A full Bitcoin node by others: bcoin on regtest, as the upstream that the tests in tests/real relay from.

Owns the node's process, its ports and its folder. Rules: nothing here is of the product (standard library only, no
codec of ours), so that it can disagree with it; nothing waits for a fixed time; and no node outlives its test, even
when pytest is killed: `node/start.js` ends when the pipe on its standard input does.

What bcoin does that matters to a test:
- It answers getheaders and announces blocks only when synced; a regtest node counts itself synced from height 0.
- Misbehaving peers are banned by address, and here every peer is 127.0.0.1: `clearbanned` by `rpc` forgives them.
- Blocks mined in one second advance the median time by one second each six blocks: 1,000 blocks mined at once end
  about three minutes in the future.
- It tells its peers of a block by cmpctblock (asked for in high-bandwidth mode), headers or inv; it has no ZMQ.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from typing_extensions import Self

NODE_DIR = Path(__file__).parent / "node"
START_TIMEOUT_S = 60.0  # it takes half a second here; a loaded two-core machine may take many times that
RPC_TIMEOUT_S = 60.0  # mining thousands of blocks is one call
POLL_INTERVAL_S = 0.02
LOG_TAIL_LINES = 60
PUBKEYHASH_VERSION = 0x3C  # bcoin's regtest; Core's regtest uses testnet's 0x6f
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class BcoinError(Exception):
    """The node could not be started, ended by itself, or did not reach what was awaited. The text holds its log."""


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
    """Ask the node until `condition` holds: RPC has no notification. Raises BcoinError naming `what`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise BcoinError(f"not within {timeout_s:g} s: {what}")
        time.sleep(POLL_INTERVAL_S)


class BcoinNode:
    """A regtest node on free loopback ports, as a context manager.

    `on_disk` keeps the chain in the node's private folder, so that `restart` can find it again; otherwise it is in
    memory and gone with the process. Heights are ints, hashes are hex in display order (the reverse of P2P bytes).
    """

    def __init__(self, name: str = "bcoin", *, on_disk: bool = False) -> None:
        self.name = name
        self.on_disk = on_disk
        self.host = "127.0.0.1"
        self.p2p_port = 0
        self.rpc_port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._cleanup = ExitStack()
        self._folder = Path()
        # Two nodes may race for a port: the key tells that the one which answers is ours.
        self._api_key = secrets.token_hex(16)

    def __enter__(self) -> Self:
        try:
            self._folder = Path(
                self._cleanup.enter_context(
                    tempfile.TemporaryDirectory(prefix=f"sprint-{self.name}-", ignore_cleanup_errors=True)
                )
            )
            self._cleanup.callback(self.kill)
            self.start()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @property
    def p2p_address(self) -> str:
        """`host:port`, as BITCOIN_NODE takes it."""
        return f"{self.host}:{self.p2p_port}"

    @property
    def pid(self) -> int:
        """Of the running node; BcoinError when it isn't running."""
        if self._process is None:
            raise BcoinError(f"{self.name} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the node and wait until RPC and P2P answer; on its first start also choose its ports.

        Raises BcoinError with the node's log if it ends or doesn't answer within a minute.
        """
        if self._process is not None:
            raise BcoinError(f"{self.name} is running already")
        choose_ports = self.p2p_port == 0
        for attempts_left in (2, 1, 0):
            if choose_ports:
                self.p2p_port, self.rpc_port = _free_ports()
            try:
                self._launch()
            except BcoinError as error:
                # A port is free until somebody else takes it: between our look and the node's bind is a gap.
                if not (choose_ports and attempts_left and "EADDRINUSE" in str(error)):
                    raise
            else:
                return

    def stop(self) -> None:
        """End the node as its operator would: it closes its database first."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            self.rpc("stop")
            try:
                process.wait(RPC_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
                raise BcoinError(f"{self.name} did not stop in {RPC_TIMEOUT_S:g} s\n{self.log_tail()}") from None
        self._reap()

    def kill(self) -> None:
        """SIGKILL, as a power cut would: connections are reset, nothing is flushed."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    def restart(self, *, keep_chain: bool = True, gracefully: bool = True) -> None:
        """Start it again on the same ports. `keep_chain` needs `on_disk`; without it the chain is genesis again."""
        if keep_chain and not self.on_disk:
            raise BcoinError(f"{self.name} has its chain in memory: on_disk=True keeps it over a restart")
        if gracefully:
            self.stop()
        else:
            self.kill()
        if not keep_chain:
            shutil.rmtree(self._folder / "chain", ignore_errors=True)
        self.start()

    def rpc(self, method: str, *params: object) -> Any:
        """One JSON-RPC call's result. RpcError if the node refuses, OSError if it isn't there."""
        connection = http.client.HTTPConnection(self.host, self.rpc_port, timeout=RPC_TIMEOUT_S)
        try:
            body = json.dumps({"method": method, "params": params, "id": 1})
            credentials = base64.b64encode(f"x:{self._api_key}".encode()).decode()
            connection.request("POST", "/", body, {"Authorization": f"Basic {credentials}"})
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise ConnectionError(f"{self.name}: {method}: HTTP {response.status} {response.reason}")
            answer = json.loads(response.read())
        except http.client.HTTPException as error:  # it ended in mid-answer
            raise ConnectionError(f"{self.name}: {method}: {error!r}") from error
        finally:
            connection.close()
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
            raise BcoinError(f"{self.name} and {other.name} have no common tip: {self.tip()}, {other.tip()}")
        losers = self.mine(depth)
        winners = other.mine(depth + 1)
        for block_hash in winners:
            self.submit(other.raw_block(block_hash))
        self.wait_for_tip(winners[-1])
        return losers, winners

    @property
    def _log(self) -> Path:
        return self._folder / "node.log"

    def log_tail(self) -> str:
        """The last lines of what the node logged."""
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return "(no log)"
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def _launch(self) -> None:
        node = shutil.which("node")
        if node is None:
            raise BcoinError("node (Node.js) is not on PATH")
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
        raise BcoinError(f"{self.name} does not answer: {state}\n{self.log_tail()}")

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

    def _reap(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.stdin is not None:
                process.stdin.close()
            process.wait()


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@contextmanager
def frozen(node: BcoinNode) -> Iterator[None]:
    """An upstream that hangs: while this lasts the node is stopped (SIGSTOP), its connections stay open."""
    os.kill(node.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(node.pid, signal.SIGCONT)

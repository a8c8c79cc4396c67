"""A C++ bitcoind as a real ZMQ publisher: Bitcoin SV 1.0.13 on regtest, whose ZMQ code is Bitcoin Core's own.

Owns the process, its ports and its folder. It is read by ZMQ and RPC only: its P2P messages begin otherwise than
Bitcoin's, but its regtest has Bitcoin's genesis and rules, so that blocks of `sprint.regtest` and of bcoin without a
witness are its blocks too, handed over by `submit`. Rules are those of bcoin.py: standard library only, every wait is
bounded, no node outlives its test (the kernel ends it with the test process).

What it does that matters to a test:
- It publishes hashblock, rawblock, hashtx and rawtx on one address; it knows no `sequence` topic.
- Transactions are published from the genesis block on, so the first counter that a subscriber sees is not 0.
- After a restart it publishes nothing until the next block comes.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.real.product import dying_with_us

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from typing_extensions import Self

BINARY = Path(__file__).parents[2] / ".cache" / "bitcoind" / "bitcoind"
TOPICS = ("hashblock", "rawblock", "hashtx", "rawtx")
START_TIMEOUT_S = 60.0  # 0.7 s here; a loaded two-core machine may take many times that
RPC_TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.02
LOG_TAIL_LINES = 40
ANYBODY = "n14LhgwmUKiknF6V3RveknJnuaqSv16yjP"
"""A regtest address to mine to."""


class BitcoindError(Exception):
    """The node could not be started, refused a call, or did not reach what was awaited. The text holds its log."""


def missing() -> str | None:
    """Why no bitcoind can be started on this machine, or None."""
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        return f"there is no packed bitcoind for {sys.platform} on {os.uname().machine}"
    if not os.access(BINARY, os.X_OK):
        return "the C++ bitcoind is not installed: ./run test fetches it"
    return None


class Bitcoind:
    """A regtest node on free loopback ports, as a context manager; the chain is on disk and survives restarts.

    Hashes are hex in display order.
    """

    def __init__(self) -> None:
        self.zmq_port = 0
        self._rpc_port = 0
        self._password = secrets.token_hex(16)
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._folder = Path(
                self._cleanup.enter_context(
                    tempfile.TemporaryDirectory(prefix="sprint-bitcoind-", ignore_cleanup_errors=True)
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
    def zmq_address(self) -> str:
        """`host:port` of its publisher, as ZMQ_NODE takes it."""
        return f"127.0.0.1:{self.zmq_port}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and wait until RPC answers; ports are chosen on the first start."""
        if self._process is not None:
            raise BitcoindError("bitcoind is running already")
        if not self.zmq_port:
            self.zmq_port, self._rpc_port = _free_ports()
        options = {
            "datadir": str(self._folder),
            "listen": "0",
            "dnsseed": "0",
            "rpcbind": "127.0.0.1",
            "rpcallowip": "127.0.0.1",
            "rpcport": str(self._rpc_port),
            "rpcuser": "test",
            "rpcpassword": self._password,
            "printtoconsole": "1",
            "preload": "0",
            "excessiveblocksize": "1000000000",
            "maxstackmemoryusageconsensus": "100000000",
            "minminingtxfee": "0.00000001",
            **{f"zmqpub{topic}": f"tcp://{self.zmq_address}" for topic in TOPICS},
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*dying_with_us(), str(BINARY), "-regtest", *(f"-{name}={value}" for name, value in options.items())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._await(self._answers, "an answer to RPC", START_TIMEOUT_S)

    def stop(self) -> None:
        """End it as its operator would."""
        if self._process is not None:
            self.rpc("stop")
            self._process.wait(RPC_TIMEOUT_S)
            self._process = None

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def rpc(self, method: str, *params: object) -> Any:
        """One JSON-RPC call's result. BitcoindError if the node refuses, OSError if it isn't there."""
        connection = http.client.HTTPConnection("127.0.0.1", self._rpc_port, timeout=RPC_TIMEOUT_S)
        try:
            credentials = base64.b64encode(f"test:{self._password}".encode()).decode()
            body = json.dumps({"method": method, "params": params, "id": 1})
            connection.request("POST", "/", body, {"Authorization": f"Basic {credentials}"})
            answer = json.loads(connection.getresponse().read())
        except (http.client.HTTPException, ValueError) as error:
            raise ConnectionError(f"bitcoind: {method}: {error!r}") from error
        finally:
            connection.close()
        if answer["error"] is not None:
            raise BitcoindError(f"{method}: {answer['error']}")
        return answer["result"]

    def mine(self, count: int = 1) -> list[str]:
        """Mine on its tip; the new blocks' hashes, lowest first."""
        hashes: list[str] = self.rpc("generatetoaddress", count, ANYBODY)
        return hashes

    def submit(self, raw_block: bytes) -> None:
        """Hand it a block; on a side branch it is kept until that branch has the most work."""
        refusal = self.rpc("submitblock", raw_block.hex())
        if refusal not in (None, "inconclusive"):
            raise BitcoindError(f"submitblock: {refusal}")

    def best(self) -> str:
        """The hash of its tip."""
        value: str = self.rpc("getbestblockhash")
        return value

    def raw_block(self, block_hash: str) -> bytes:
        """A whole block as it goes over the wire."""
        return bytes.fromhex(self.rpc("getblock", block_hash, 0))

    def log_tail(self) -> str:
        """The last lines of what it logged."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "\n".join(lines[-LOG_TAIL_LINES:])

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """While this lasts it is stopped (SIGSTOP): it says nothing, its connections stay open."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    @property
    def _log(self) -> Path:
        return self._folder / "bitcoind.log"

    def _answers(self) -> bool:
        try:
            self.rpc("getblockcount")
        except (OSError, BitcoindError):  # not there yet, or still warming up
            return False
        return True

    def _await(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.running or time.monotonic() > deadline:
                log = self.log_tail()
                self.kill()
                raise BitcoindError(f"not within {timeout_s:g} s: {what}\n{log}")
            time.sleep(POLL_INTERVAL_S)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]

"""A C++ bitcoind as a real ZMQ publisher: Bitcoin SV 1.0.13 on regtest, whose ZMQ code is Bitcoin Core's own.

It is read by ZMQ and RPC only: its P2P messages begin otherwise than Bitcoin's, but its regtest has Bitcoin's genesis
and rules, so that blocks of `sprint.regtest` and of bcoin without a witness are its blocks too, given it by `submit`.
Rules are those of node_process.py; every wait is bounded, and the kernel ends it with the test process.

What it does that matters to a test:
- It publishes hashblock, rawblock, hashtx and rawtx on one address; it knows no `sequence` topic.
- Transactions are published from the genesis block on, so the first counter that a subscriber sees is not 0.
- After a restart it publishes nothing until the next block comes.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.real.node_process import HOST, POLL_INTERVAL_S, NodeError, NodeProcess, free_ports
from tests.real.product import dying_with_us

if TYPE_CHECKING:
    from collections.abc import Callable

BINARY = Path(__file__).parents[2] / ".cache" / "bitcoind" / "bitcoind"
TOPICS = ("hashblock", "rawblock", "hashtx", "rawtx")
START_TIMEOUT_S = 60.0  # 0.7 s here; a loaded two-core machine may take many times that
ANYBODY = "n14LhgwmUKiknF6V3RveknJnuaqSv16yjP"
"""A regtest address to mine to."""


def missing() -> str | None:
    """Why no bitcoind can be started on this machine, or None."""
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        return f"there is no packed bitcoind for {sys.platform} on {os.uname().machine}"
    if not os.access(BINARY, os.X_OK):
        return "the C++ bitcoind is not installed: ./run test fetches it"
    return None


class Bitcoind(NodeProcess):
    """A regtest node; the chain is on disk and survives restarts.

    Hashes are hex in display order.
    """

    def __init__(self) -> None:
        super().__init__("bitcoind")
        self.zmq_port = 0
        self._password = secrets.token_hex(16)

    @property
    def zmq_address(self) -> str:
        """`host:port` of its publisher, as ZMQ_NODE takes it."""
        return f"{HOST}:{self.zmq_port}"

    def start(self) -> None:
        """Start it and wait until RPC answers; ports are chosen on the first start."""
        if self._process is not None:
            raise NodeError("bitcoind is running already")
        if not self.zmq_port:
            self.zmq_port, self.rpc_port = free_ports()
        options = {
            "datadir": str(self._folder),
            "listen": "0",
            "dnsseed": "0",
            "rpcbind": HOST,
            "rpcallowip": HOST,
            "rpcport": str(self.rpc_port),
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
        if self.running:
            self.rpc("stop")
        self._wait_for_end()

    def rpc(self, method: str, *params: object) -> Any:
        """One JSON-RPC call's result. NodeError if the node refuses, OSError if it isn't there."""
        _, body = self._post("test", self._password, method, params)
        try:
            answer = json.loads(body)
        except ValueError as error:
            raise ConnectionError(f"{self.name}: {method}: {error!r}") from error
        if answer["error"] is not None:
            raise NodeError(f"{method}: {answer['error']}")
        return answer["result"]

    def mine(self, count: int = 1) -> list[str]:
        """Mine on its tip; the new blocks' hashes, lowest first."""
        hashes: list[str] = self.rpc("generatetoaddress", count, ANYBODY)
        return hashes

    def submit(self, raw_block: bytes) -> None:
        """Hand it a block; on a side branch it is kept until that branch has the most work."""
        refusal = self.rpc("submitblock", raw_block.hex())
        if refusal not in (None, "inconclusive"):
            raise NodeError(f"submitblock: {refusal}")

    def best(self) -> str:
        """The hash of its tip."""
        value: str = self.rpc("getbestblockhash")
        return value

    def raw_block(self, block_hash: str) -> bytes:
        """A whole block as it goes over the wire."""
        return bytes.fromhex(self.rpc("getblock", block_hash, 0))

    def _answers(self) -> bool:
        try:
            self.rpc("getblockcount")
        except (OSError, NodeError):  # not there yet, or still warming up
            return False
        return True

    def _await(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.running or time.monotonic() > deadline:
                log = self.log_tail()
                self.kill()
                raise NodeError(f"not within {timeout_s:g} s: {what}\n{log}")
            time.sleep(POLL_INTERVAL_S)

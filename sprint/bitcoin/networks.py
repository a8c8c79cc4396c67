"""What differs between the Bitcoin networks: framing, genesis, the rules of difficulty and version, bars of work.

The figures are those of Bitcoin Core's chain parameters (v30). Hashes are in wire order, the reverse of what block
explorers print. A network is data: whoever applies a rule asks the network for its figures and never for its name.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from sprint.bitcoin.block import double_sha256

_TWO_WEEKS_S = 14 * 24 * 3600
_DAY_S = 24 * 3600
_MAIN_POW_LIMIT = (1 << 224) - 1
_SIGNET_CHALLENGE = bytes.fromhex(
    "5121"
    "03ad5e0edad18cb1f0fc0d28a3d4f1f3e445640337489abb10404f2d1e086be430"
    "21"
    "0359ef5021964fe22d6f8e05b2463c9540ce96883fe3b278760f048f5189f2e6c4"
    "52ae"
)
"""1-of-2 multisignature script of the public signet; BIP325 derives the message start from it."""


@dataclass(frozen=True, slots=True)
class Network:
    """One Bitcoin network. Heights are of blocks, times in seconds, work in expected hashes."""

    name: str
    magic: bytes
    """4 bytes, the start of each message."""
    port: int
    genesis_header: bytes
    """80 bytes."""
    genesis_hash: bytes
    """32 bytes, wire order."""
    pow_limit: int
    """The easiest target that any block may have."""
    pow_limit_bits: int
    """The same in nBits' form, which keeps only three digits of it."""
    interval: int
    """Blocks from one retarget to the next."""
    target_timespan: int
    """Seconds that `interval` blocks should take."""
    allow_min_difficulty: bool
    """A block more than twice the spacing after its parent may have the limit's nBits."""
    bip94: bool
    """Retarget from the period's first nBits; a period's first block at most 600 s before its parent."""
    no_retargeting: bool
    """nBits never change."""
    bip34_height: int
    """From here on blocks of version below 2 are refused."""
    bip66_height: int
    """From here on blocks of version below 3 are refused."""
    bip65_height: int
    """From here on blocks of version below 4 are refused."""
    minimum_chain_work: int
    """A chain below it is not yet the real one: whoever serves it is still syncing, or lies."""
    max_tip_age_s: int | None
    """A tip older than this means initial download (Core's bound); None: age says nothing (regtest)."""

    @property
    def target_spacing(self) -> int:
        """Seconds that one block should take."""
        return self.target_timespan // self.interval


def signet_magic(challenge: bytes) -> bytes:
    """The message start of the signet whose blocks satisfy `challenge` (BIP325); at most 252 bytes of it."""
    if len(challenge) >= 0xFD:
        raise ValueError(f"signet challenge of {len(challenge)} bytes: fewer than 253 expected")
    return double_sha256(bytes((len(challenge),)) + challenge)[:4]


def _hash(display: str) -> bytes:
    return bytes.fromhex(display)[::-1]


def _genesis(merkle_root: str, time: int, bits: int, nonce: int) -> bytes:
    return struct.pack("<i32s32sIII", 1, bytes(32), _hash(merkle_root), time, bits, nonce)


_SATOSHI_MERKLE_ROOT = "4a5e1e4baab89f3a32518a88c31bc87f618f76673e2cc77ab2127b7afdeda33b"
"""One and the same coinbase opens every network but testnet4."""

MAIN = Network(
    name="main",
    magic=bytes.fromhex("f9beb4d9"),
    port=8333,
    genesis_header=_genesis(_SATOSHI_MERKLE_ROOT, 1231006505, 0x1D00FFFF, 2083236893),
    genesis_hash=_hash("000000000019d6689c085ae165831e934ff763ae46a2a6c172b3f1b60a8ce26f"),
    pow_limit=_MAIN_POW_LIMIT,
    pow_limit_bits=0x1D00FFFF,
    interval=2016,
    target_timespan=_TWO_WEEKS_S,
    allow_min_difficulty=False,
    bip94=False,
    no_retargeting=False,
    bip34_height=227_931,
    bip66_height=363_725,
    bip65_height=388_381,
    minimum_chain_work=0xDEE8E2A309AD8A9820433C68,
    max_tip_age_s=_DAY_S,
)

TESTNET3 = Network(
    name="testnet3",
    magic=bytes.fromhex("0b110907"),
    port=18333,
    genesis_header=_genesis(_SATOSHI_MERKLE_ROOT, 1296688602, 0x1D00FFFF, 414098458),
    genesis_hash=_hash("000000000933ea01ad0ee984209779baaec3ced90fa3f408719526f8d77f4943"),
    pow_limit=_MAIN_POW_LIMIT,
    pow_limit_bits=0x1D00FFFF,
    interval=2016,
    target_timespan=_TWO_WEEKS_S,
    allow_min_difficulty=True,
    bip94=False,
    no_retargeting=False,
    bip34_height=21_111,
    bip66_height=330_776,
    bip65_height=581_885,
    minimum_chain_work=0x16DD270DD94FAC1D7632,
    max_tip_age_s=_DAY_S,
)

TESTNET4 = Network(
    name="testnet4",
    magic=bytes.fromhex("1c163f28"),
    port=48333,
    genesis_header=_genesis(
        "7aa0a7ae1e223414cb807e40cd57e667b718e42aaf9306db9102fe28912b7b4e", 1714777860, 0x1D00FFFF, 393743547
    ),
    genesis_hash=_hash("00000000da84f2bafbbc53dee25a72ae507ff4914b867c565be350b0da8bf043"),
    pow_limit=_MAIN_POW_LIMIT,
    pow_limit_bits=0x1D00FFFF,
    interval=2016,
    target_timespan=_TWO_WEEKS_S,
    allow_min_difficulty=True,
    bip94=True,
    no_retargeting=False,
    bip34_height=1,
    bip66_height=1,
    bip65_height=1,
    minimum_chain_work=0x34A4690FE592DC49C7C,
    max_tip_age_s=_DAY_S,
)

SIGNET = Network(
    name="signet",
    magic=signet_magic(_SIGNET_CHALLENGE),
    port=38333,
    genesis_header=_genesis(_SATOSHI_MERKLE_ROOT, 1598918400, 0x1E0377AE, 52613770),
    genesis_hash=_hash("00000008819873e925422c1ff0f99f7cc9bbb232af63a077a480a3633bee1ef6"),
    pow_limit=0x377AE << 216,
    pow_limit_bits=0x1E0377AE,
    interval=2016,
    target_timespan=_TWO_WEEKS_S,
    allow_min_difficulty=False,
    bip94=False,
    no_retargeting=False,
    bip34_height=1,
    bip66_height=1,
    bip65_height=1,
    minimum_chain_work=0x67D328E681A,
    max_tip_age_s=_DAY_S,
)

REGTEST = Network(
    name="regtest",
    magic=bytes.fromhex("fabfb5da"),
    port=18444,
    genesis_header=_genesis(_SATOSHI_MERKLE_ROOT, 1296688602, 0x207FFFFF, 2),
    genesis_hash=_hash("0f9188f13cb7b2c71f2a335e3a4fc328bf5beb436012afca590b1a11466e2206"),
    pow_limit=(1 << 255) - 1,
    pow_limit_bits=0x207FFFFF,
    interval=144,
    target_timespan=_DAY_S,
    allow_min_difficulty=True,
    bip94=False,
    no_retargeting=True,
    bip34_height=1,
    bip66_height=1,
    bip65_height=1,
    minimum_chain_work=0,
    max_tip_age_s=None,
)

NETWORKS: dict[str, Network] = {network.name: network for network in (MAIN, TESTNET3, TESTNET4, SIGNET, REGTEST)}
"""By the name that NETWORK in the configuration carries."""

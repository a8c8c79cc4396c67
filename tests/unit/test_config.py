"""Configuration: every variable's default, what beats what, and that a bad value ends in one line that says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sprint.addresses import Address
from sprint.bitcoin.networks import NETWORKS
from sprint.config import ENV_FILE, MAX_ENV_FILE_SIZE, Config, load
from sprint.errors import ConfigError
from sprint.settings import MAX_UPSTREAMS, variables
from sprint.tiers import PROFILES, Tier

ROOT = Path(__file__).resolve().parents[2]
NAMES = [variable.name for variable in variables()]
SWITCHES = ["USE_SHARED_MEMORY", "USE_DIRECT_P2P", "USE_MEMORY_CHANNEL", "OPTIMIZE_SYSTEM"]
# Of each variable: the field of Config, a value for .env, and what comes of it; another for the environment, likewise.
SETTABLE: list[tuple[str, str, str, Any, str, Any]] = [
    ("TIER", "tier", "pro", Tier.PRO, "Enterprise", Tier.ENTERPRISE),
    *((name, name.lower(), "true", True, "no", False) for name in SWITCHES),
    ("ENABLE_KERNEL_BYPASS", "enable_kernel_bypass", "1", True, "off", False),
    ("INTERFACE", "interfaces", "enp3s0", ("enp3s0",), "bond0.7, enp3s0", ("bond0.7", "enp3s0")),
    ("CAPTURE", "capture", "ringbuf", ("ringbuf",), "ringbuf, af_xdp", ("ringbuf", "af_xdp")),
    ("WRITE_DEADLINE", "write_deadline_ns", "700us", 700_000, "1.25s", 1_250_000_000),
    ("BLOCK_BUFFER_SIZE", "ring_slots", "1000", 1_000, "3", 3),
    ("NETWORK", "network", "signet", NETWORKS["signet"], "REGTEST", NETWORKS["regtest"]),
    (
        *("BITCOIN_NODE", "upstreams"),
        *("one.internal:8333", (Address("one.internal", 8333),)),
        *("two.internal, [::1]:18444", (Address("two.internal", 8333), Address("::1", 18444))),
    ),
    (
        *("ZMQ_NODE", "zmq_nodes"),
        *("one.internal:28332", (Address("one.internal", 28332),)),
        *("two.internal:1, [::1]:2", (Address("two.internal", 1), Address("::1", 2))),
    ),
    ("API_BIND", "api_bind", "0.0.0.0:80", Address("0.0.0.0", 80), "[::]:0", Address("::", 0)),
    ("STREAM_BIND", "stream_bind", "0.0.0.0:81", Address("0.0.0.0", 81), "localhost:9", Address("localhost", 9)),
    ("UDP_BIND", "udp_bind", "0.0.0.0:83", Address("0.0.0.0", 83), "[::1]:0", Address("::1", 0)),
    ("ZMQ_BIND", "zmq_bind", "0.0.0.0:82", Address("0.0.0.0", 82), "[::1]:0", Address("::1", 0)),
    ("ZMQ_PROOF", "zmq_proof", "header", "header", "NODE", "node"),
    ("CONNECTIONS_PER_ADDRESS", "connections_per_address", "1", 1, "1000000", 1_000_000),
    ("DELIVERY_WORKERS", "delivery_workers", "3", 3, "8", 8),
    ("SHM_SOCKET", "shm_socket", "/run/sprint.sock", Path("/run/sprint.sock"), "here.sock", Path("here.sock")),
    ("DATA_DIR", "data_dir", "/srv/sprint", Path("/srv/sprint"), "kept/here", Path("kept/here")),
    ("LOG_FORMAT", "log_format", "json", "json", "text", "text"),
]
PATHS = {"DATA_DIR", "SHM_SOCKET"}
BAD = [
    ("TIER", "platinum", "expected one of free, pro, business, turbo, enterprise"),
    ("TIER", " ", "expected one of free, pro, business, turbo, enterprise"),
    *((name, "maybe", "expected true or false") for name in (*SWITCHES, "ENABLE_KERNEL_BYPASS")),
    *(
        ("INTERFACE", value, "expected names of interfaces, separated by commas, and not lo")
        for value in ("lo", "a/b", "x" * 16, "..", "eth0,", "eth0,lo", "eth 0")
    ),
    *(
        ("INTERFACE", value, "expected 1 to 8 interfaces, each once")
        for value in ("eth0,eth0", ",".join(f"eth{number}" for number in range(9)))
    ),
    *(("CAPTURE", value, "expected af_xdp or ringbuf, or both") for value in ("dpdk", "ringbuf,ringbuf", "af_xdp,")),
    ("WRITE_DEADLINE", "500", "expected a duration such as 500us, 200ms or 1.5s"),
    ("WRITE_DEADLINE", "-1s", "expected a duration such as 500us, 200ms or 1.5s"),
    ("WRITE_DEADLINE", "9us", "expected 10µs to 60s"),
    ("WRITE_DEADLINE", "61s", "expected 10µs to 60s"),
    ("BLOCK_BUFFER_SIZE", "1", "expected a whole number from 2 to 1048576"),
    ("BLOCK_BUFFER_SIZE", "1048577", "expected a whole number from 2 to 1048576"),
    ("BLOCK_BUFFER_SIZE", "2e3", "expected a whole number from 2 to 1048576"),
    ("BLOCK_BUFFER_SIZE", "٥٠٠", "expected a whole number from 2 to 1048576"),
    ("NETWORK", "testnet", f"expected one of {', '.join(NETWORKS)}"),
    ("BITCOIN_NODE", "one.internal:0", "port '0': expected 1 to 65535"),
    ("BITCOIN_NODE", "one.internal:8333,", "expected host:port"),
    ("BITCOIN_NODE", "tcp://one.internal:8333", "expected host:port"),
    ("BITCOIN_NODE", "a:1,b:2,a:1", "expected each address once"),
    ("BITCOIN_NODE", "a,a:8333", "expected each address once"),
    ("BITCOIN_NODE", ",".join(f"n{n}" for n in range(MAX_UPSTREAMS + 1)), "expected 1 to 16 addresses"),
    ("ZMQ_NODE", "one.internal", "a port is missing: expected host:port"),
    ("ZMQ_NODE", "tcp://one.internal:28332", "expected host:port"),
    ("ZMQ_NODE", "a:1,a:1", "expected 1 to 8 addresses, separated by commas, each once"),
    ("ZMQ_NODE", "127.0.0.1:8333", "expected a port of its own, which BITCOIN_NODE hasn't"),
    ("UDP_BIND", "8436", "a port is missing: expected host:port"),
    ("ZMQ_BIND", "28434", "a port is missing: expected host:port"),
    ("ZMQ_PROOF", "block", "expected node or header"),
    *((name, "8080", "a port is missing: expected host:port") for name in ("API_BIND", "STREAM_BIND")),
    *((name, "localhost:65536", "port '65536': expected 0 to 65535") for name in ("API_BIND", "STREAM_BIND")),
    *((name, ":80", "expected host:port") for name in ("API_BIND", "STREAM_BIND")),
    *(("DELIVERY_WORKERS", value, "expected a whole number from 1 to 8") for value in ("0", "9", "two", "-1")),
    *(("CONNECTIONS_PER_ADDRESS", value, "expected a whole number from 1 to 1000000") for value in ("0", "-1", "1e9")),
    ("SHM_SOCKET", "$HOME/sprint.sock", "variables in it are not replaced"),
    ("DATA_DIR", "${HOME}/sprint", "variables in it are not replaced"),
    ("DATA_DIR", "~no-such-user/sprint", "there is no home directory for ~"),
    ("LOG_FORMAT", "xml", "expected text or json"),
]


def load_with(folder: Path, env_file: str | bytes | None = None, **environ: str) -> Config:
    if env_file is not None:
        content = env_file.encode() if isinstance(env_file, str) else env_file
        (folder / ENV_FILE).write_bytes(content)
    return load(environ, folder)


def assert_one_plain_line(text: str) -> None:
    assert text.isprintable(), f"{text!r} holds control characters"
    assert text.splitlines() == [text]
    assert len(text) < 400


def test_the_tables_here_cover_every_variable() -> None:
    assert [row[0] for row in SETTABLE] == NAMES
    assert {row[0] for row in BAD} == set(NAMES)


# Defaults


def test_with_nothing_set_the_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    loaded = load_with(tmp_path)
    assert loaded.tier is Tier.FREE
    assert loaded.enable_kernel_bypass is False
    assert loaded.network.name == "main"
    assert loaded.upstreams == (Address("127.0.0.1", 8333),)
    assert loaded.api_bind == Address("127.0.0.1", 8080)
    assert loaded.stream_bind == Address("127.0.0.1", 8434)
    assert loaded.log_format == "text"
    assert loaded.warnings == ()


@pytest.mark.parametrize("tier", list(Tier), ids=lambda tier: tier.label)
def test_the_tier_s_defaults_are_the_guide_s(tier: Tier, tmp_path: Path) -> None:
    loaded = load_with(tmp_path, TIER=tier.label)
    top = tier in {Tier.TURBO, Tier.ENTERPRISE}
    assert [getattr(loaded, name.lower()) for name in SWITCHES] == [top] * 4
    assert loaded.enable_kernel_bypass is False
    assert loaded.write_deadline_ns == PROFILES[tier].write_deadline_ns
    assert loaded.ring_slots == PROFILES[tier].ring_slots
    assert loaded.write_deadlines_ns() == {each: PROFILES[each].write_deadline_ns for each in Tier}


@pytest.mark.parametrize(
    ("tier", "deadline_ns", "slots"),
    [
        ("free", 2_000_000_000, 512),
        ("pro", 1_500_000_000, 1_280),
        ("business", 1_000_000_000, 1_536),
        ("turbo", 500_000, 2_048),
        ("enterprise", 200_000, 4_096),
    ],
)
def test_the_guide_s_figures_stand(tier: str, deadline_ns: int, slots: int, tmp_path: Path) -> None:
    loaded = load_with(tmp_path, TIER=tier)
    assert (loaded.write_deadline_ns, loaded.ring_slots) == (deadline_ns, slots)


@pytest.mark.parametrize("tier", list(Tier), ids=lambda tier: tier.label)
def test_a_write_deadline_counts_for_the_instance_s_own_tier_only(tier: Tier, tmp_path: Path) -> None:
    loaded = load_with(tmp_path, TIER=tier.label, WRITE_DEADLINE="3ms")
    expected = {each: PROFILES[each].write_deadline_ns for each in Tier} | {tier: 3_000_000}
    assert loaded.write_deadlines_ns() == expected


@pytest.mark.parametrize("network", NETWORKS.values(), ids=lambda network: network.name)
def test_a_node_without_a_port_gets_the_network_s(network: Any, tmp_path: Path) -> None:
    assert load_with(tmp_path, NETWORK=network.name).upstreams == (Address("127.0.0.1", network.port),)
    loaded = load_with(tmp_path, NETWORK=network.name, BITCOIN_NODE="a,b:1")
    assert loaded.upstreams == (Address("a", network.port), Address("b", 1))


def test_data_is_kept_under_var_lib_as_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert load_with(tmp_path, XDG_DATA_HOME="/xdg").data_dir == Path("/var/lib/sprint")


def test_data_is_kept_in_the_user_s_data_home_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/satoshi")
    assert load_with(tmp_path, XDG_DATA_HOME="/xdg").data_dir == Path("/xdg/sprint")
    in_home = Path("/home/satoshi/.local/share/sprint")
    assert load_with(tmp_path).data_dir == in_home
    assert load_with(tmp_path, XDG_DATA_HOME="relative").data_dir == in_home
    assert load_with(tmp_path, DATA_DIR="~/blocks").data_dir == Path("/home/satoshi/blocks")


def test_a_user_without_a_home_is_told_to_set_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match="DATA_DIR=: expected"):
        load_with(tmp_path)
    assert load_with(tmp_path, DATA_DIR="/srv").data_dir == Path("/srv")


# What beats what


@pytest.mark.parametrize(("name", "field", "in_file", "of_file", "in_environ", "of_environ"), SETTABLE)
def test_the_environment_beats_the_file_and_the_file_the_default(
    name: str, field: str, in_file: str, of_file: object, in_environ: str, of_environ: object, tmp_path: Path
) -> None:
    default = getattr(load_with(tmp_path), field)
    assert default != of_file
    assert getattr(load_with(tmp_path, f"{name}={in_file}\n"), field) == of_file
    assert getattr(load({name: in_environ}, tmp_path), field) == of_environ
    assert of_environ != of_file


def test_a_switch_that_is_set_beats_the_tier_s_default_in_both_directions(tmp_path: Path) -> None:
    assert load_with(tmp_path, TIER="turbo", USE_SHARED_MEMORY="false").use_shared_memory is False
    assert load_with(tmp_path, TIER="free", USE_SHARED_MEMORY="true").use_shared_memory is True


def test_an_empty_value_is_as_good_as_none(tmp_path: Path) -> None:
    empty = dict.fromkeys(NAMES, "")
    assert load(empty, tmp_path) == load({}, tmp_path)
    assert load_with(tmp_path, "TIER=pro\n", TIER="").tier is Tier.PRO


def test_lower_case_names_count_but_less_than_upper_case_ones(tmp_path: Path) -> None:
    assert load_with(tmp_path, tier="pro").tier is Tier.PRO
    assert load_with(tmp_path, TIER="turbo", tier="pro").tier is Tier.TURBO
    assert load_with(tmp_path, tier="pro", TIER="turbo").tier is Tier.TURBO


def test_without_arguments_the_process_s_own_environment_and_folder_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ENV_FILE).write_text("TIER=business\nNETWORK=signet\n")
    monkeypatch.setenv("NETWORK", "regtest")
    loaded = load()
    assert (loaded.tier, loaded.network.name) == (Tier.BUSINESS, "regtest")


# Bad values


@pytest.mark.parametrize("where", ["environment", "file"])
@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_a_bad_value_is_named_with_what_is_allowed(
    name: str, value: str, allowed: str, where: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_with(tmp_path, f'{name}="{value}"\n') if where == "file" else load({name: value}, tmp_path)
    text = str(caught.value)
    assert caught.value.variable == name
    assert text.startswith(f"{name}={value[:80]}")
    assert allowed in text
    assert_one_plain_line(text)


@pytest.mark.parametrize("name", NAMES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(value=st.one_of(st.text(st.characters(codec=None), max_size=200), st.text("0123456789.:[]s,~$\n\x1b% ")))
def test_any_text_is_taken_or_refused_in_one_plain_line(name: str, value: str, tmp_path: Path) -> None:
    complaint = None
    try:
        load({name: value}, tmp_path)
    except ConfigError as error:
        complaint = str(error)
    if complaint is not None:
        assert complaint.startswith(f"{name}=")
        assert_one_plain_line(complaint)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PATHS])  # any other text is a path
@pytest.mark.parametrize("value", ["x:1\n2", "\x1b[2J:1", "x:\x1b[31m", "x\x00:1", "x:\u202e1", "\udc80:1"])
def test_control_characters_in_a_value_never_reach_the_message(name: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load({name: value}, tmp_path)
    assert_one_plain_line(str(caught.value))


def test_a_long_value_is_shown_cut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^TIER={'x' * 80}…: expected"):
        load_with(tmp_path, TIER="x" * 100_000)


def test_the_first_bad_value_in_the_order_of_the_variables_is_the_one_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^WRITE_DEADLINE="):
        load_with(tmp_path, LOG_FORMAT="xml", WRITE_DEADLINE="soon", NETWORK="none")


# The file


def test_the_guide_s_env_file_is_read(tmp_path: Path) -> None:
    loaded = load_with(
        tmp_path,
        "TIER=turbo\nUSE_SHARED_MEMORY=true\nUSE_DIRECT_P2P=true\nUSE_MEMORY_CHANNEL=true\nOPTIMIZE_SYSTEM=true\n",
    )
    assert loaded.tier is Tier.TURBO
    assert loaded.warnings == ()


def test_comments_quotes_exports_and_a_byte_order_mark_are_understood(tmp_path: Path) -> None:
    loaded = load_with(
        tmp_path,
        "\ufeffTIER=turbo  # the fast one\r\n# NETWORK=main\r\nexport NETWORK='regtest'\r\n\r\nDATA_DIR=\"/a b\"\r\n",
    )
    assert (loaded.tier, loaded.network.name, loaded.data_dir) == (Tier.TURBO, "regtest", Path("/a b"))
    assert loaded.warnings == ()


def test_an_unknown_key_in_the_file_is_warned_of_and_one_in_the_environment_is_not(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, "TEIR=turbo\nTIER=pro\n", TEIR="turbo", PATH="/bin")
    assert loaded.tier is Tier.PRO
    assert loaded.warnings == (".env: TEIR is not a variable of Sprint",)


def test_a_line_that_is_no_setting_is_warned_of_and_the_others_count(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, "NETWORK=regtest\nTIER='turbo\n?!=\nLOG_FORMAT=json\n")
    assert (loaded.network.name, loaded.tier, loaded.log_format) == ("regtest", Tier.FREE, "json")
    assert loaded.warnings[0] == ".env: line 2 can't be read: expected NAME=value"
    assert all(warning.isprintable() for warning in loaded.warnings)


def test_a_broken_file_writes_nothing_to_the_log_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_with(tmp_path, "TIER='turbo\n=\n")
    assert not caplog.records


def test_a_control_character_in_an_unknown_key_does_not_reach_the_warning(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, "'A\nB\x1b[2J'=1\nC\x1b=1\n")
    assert loaded.warnings
    assert all(warning.isprintable() for warning in loaded.warnings)


def test_values_in_the_file_do_not_grow_by_reference(tmp_path: Path) -> None:
    lines = ["A0=xxxxxxxxxx", *(f"A{n}=${{A{n - 1}}}${{A{n - 1}}}" for n in range(1, 40)), "TIER=${A39}"]
    with pytest.raises(ConfigError, match=re.escape("TIER=${A39}: expected")):
        load_with(tmp_path, "\n".join(lines))


@pytest.mark.parametrize("content", [b"TIER=\xff\n", "TIER=turbo\n".encode("utf-16")])
def test_a_file_that_is_not_utf_8_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected UTF-8 text") as caught:
        load_with(tmp_path, content)
    assert caught.value.variable == ENV_FILE
    assert_one_plain_line(str(caught.value))


def test_a_file_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / ENV_FILE).mkdir()
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        load_with(tmp_path)


def test_a_file_that_is_too_large_is_refused_and_one_that_just_fits_is_read(tmp_path: Path) -> None:
    line = "TIER=pro\n"
    assert load_with(tmp_path, line + "#" * (MAX_ENV_FILE_SIZE - len(line))).tier is Tier.PRO
    with pytest.raises(ConfigError, match=f"expected at most {MAX_ENV_FILE_SIZE} bytes"):
        load_with(tmp_path, line + "#" * (MAX_ENV_FILE_SIZE - len(line) + 1))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text("TIERNWO=pro'\"\\\n\r#$ \x1b", max_size=80).map(str.encode)))
def test_any_file_is_read_or_refused_in_one_plain_line(tmp_path: Path, content: bytes) -> None:
    try:
        loaded = load_with(tmp_path, content)
    except ConfigError as error:
        text = str(error).replace(str(tmp_path), "")
        assert_one_plain_line(text)
    else:
        assert all(warning.isprintable() for warning in loaded.warnings)


# Through the real command


def sprint_run(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name.upper() not in NAMES}
    return subprocess.run(
        [sys.executable, "-m", "sprint", "run", *arguments],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("TIER", "platinum", "sprint: TIER=platinum: expected one of free, pro, business, turbo, enterprise"),
        ("API_BIND", "localhost:\x1b[31m", "sprint: API_BIND=localhost:�[31m: port '\\x1b[31m': expected 0 to 65535"),
    ],
)
def test_the_command_ends_with_2_and_one_line_at_a_bad_value(name: str, value: str, line: str, tmp_path: Path) -> None:
    done = sprint_run(tmp_path, **{name: value})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")


def test_the_command_ends_with_2_and_one_line_at_a_bad_file(tmp_path: Path) -> None:
    (tmp_path / ENV_FILE).write_text("NETWORK='broken\nTEIR=1\nWRITE_DEADLINE=soon\n")
    done = sprint_run(tmp_path)
    expected = "sprint: WRITE_DEADLINE=soon: expected a duration such as 500us, 200ms or 1.5s\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_the_command_s_help_names_every_variable_with_its_default(tmp_path: Path) -> None:
    done = sprint_run(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert [line for line in lines if line in NAMES] == NAMES
    text = " ".join(lines)
    for variable in variables():
        assert f"{variable.name} {variable.description} Default: {variable.default}." in text


def test_a_tiers_own_nodes_take_the_place_of_the_common_ones(tmp_path: Path) -> None:
    common = {"BITCOIN_NODE": "common", "TURBO_BITCOIN_NODE": "turbo-1,turbo-2", "PRO_BITCOIN_NODE": "pro"}
    for tier, hosts in (("free", ["common"]), ("pro", ["pro"]), ("turbo", ["turbo-1", "turbo-2"])):
        loaded = load({**common, "TIER": tier}, tmp_path)
        assert [upstream.host for upstream in loaded.upstreams] == hosts
        assert loaded.warnings == ()


def test_a_bad_node_of_a_tiers_own_is_named_as_it_was_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^TURBO_BITCOIN_NODE"):
        load({"TIER": "turbo", "TURBO_BITCOIN_NODE": ","}, tmp_path)
    assert load({"TIER": "pro", "TURBO_BITCOIN_NODE": ","}, tmp_path).upstreams  # which isn't asked for


def test_the_environment_beats_the_file_for_a_tiers_own_nodes_too(tmp_path: Path) -> None:
    (tmp_path / ENV_FILE).write_text("turbo_bitcoin_node=from-file\nTURBO_NETWORK=main\n", encoding="utf-8")
    loaded = load({"TIER": "turbo", "BITCOIN_NODE": "common"}, tmp_path)
    assert [upstream.host for upstream in loaded.upstreams] == ["from-file"]
    assert [warning for warning in loaded.warnings if "TURBO_NETWORK" in warning]

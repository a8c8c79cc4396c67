"""The doctor's findings, on this host and on made-up ones."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import platform
import resource
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from sprint import doctor
from sprint.addresses import Address
from sprint.doctor import Check, as_dicts, examine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

RELEASE = "6.1.0-37-amd64"
ALL_CAPABILITIES = (1 << 41) - 1


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a made-up host on which everything is there: a Debian 12 with a NIC of four queues."""
    monkeypatch.setattr(platform, "release", lambda: RELEASE)
    files = {
        "proc/self/status": f"Name:\tpython\nCapPrm:\t0\nCapEff:\t{ALL_CAPABILITIES:016x}\n",
        "proc/sys/net/core/somaxconn": "4096\n",
        "sys/kernel/btf/vmlinux": "BTF",
        "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc\n",
        "sys/devices/system/clocksource/clocksource0/available_clocksource": "tsc hpet acpi_pm\n",
        "sys/class/net/eth7/mtu": "1500\n",
        "sys/class/net/eth7/type": "1\n",
        "sys/class/net/eth7/operstate": "up\n",
        "sys/class/net/lo/mtu": "65536\n",
        "sys/class/net/lo/type": "772\n",
        "sys/class/net/bonding_masters": "bond0\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for queue in ("rx-0", "rx-1", "rx-2", "rx-3", "tx-0", "tx-1"):
        (tmp_path / "sys/class/net/eth7/queues" / queue).mkdir(parents=True)
    (tmp_path / "sys/bus/pci/drivers/igc").mkdir(parents=True)
    (tmp_path / "sys/class/net/eth7/device").mkdir()
    (tmp_path / "sys/class/net/eth7/device/driver").symlink_to(tmp_path / "sys/bus/pci/drivers/igc")
    (tmp_path / f"lib/modules/{RELEASE}/build/include/generated").mkdir(parents=True)
    (tmp_path / f"lib/modules/{RELEASE}/source/include/uapi/linux").mkdir(parents=True)
    return tmp_path


def found(host: Path, name: str, environ: Mapping[str, str] | None = None) -> Check:
    """The one check of that name."""
    (check,) = [check for check in examine(root=host, environ=environ or {}) if check.name == name]
    return check


def names_of(checks: Sequence[Check], ok: bool | None) -> set[str]:
    """Which checks came out so."""
    return {check.name for check in checks if check.ok is ok}


def test_this_host_is_examined_without_an_exception_and_each_finding_is_one_line() -> None:
    checks = examine()
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert check.name
        assert check.found
        for text in (check.name, check.found, check.remedy):
            assert text.isprintable(), check
        if check.ok is False:
            assert check.remedy, check
        if check.ok:
            assert not check.remedy, check


def test_the_findings_of_this_host_are_what_the_system_says() -> None:
    by_name = {check.name: check for check in examine()}
    assert platform.python_version() in by_name["python"].found
    assert platform.release() in by_name["kernel for live frames (UDP fan-out)"].found
    assert str(len(os.sched_getaffinity(0))) in by_name["CPUs"].found
    told = {name.removeprefix("interface ") for name in by_name if name.startswith("interface ")}
    assert told == {name for _, name in socket.if_nameindex()}


def test_dicts_go_through_json_and_hold_the_four_fields() -> None:
    dicts = as_dicts([Check("a", None, "b"), Check("c", False, "d", "e")])
    assert json.loads(json.dumps(dicts)) == [
        {"name": "a", "ok": None, "found": "b", "remedy": ""},
        {"name": "c", "ok": False, "found": "d", "remedy": "e"},
    ]


def test_a_host_that_tells_nothing_is_a_list_of_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "unheard-of")
    checks = examine(root=tmp_path / "none", environ={})
    assert {"BTF", "kernel headers"} <= names_of(checks, ok=False)
    untold = {
        "CAP_NET_ADMIN",
        "clock source",
        "net.core.somaxconn",
        "interfaces",
        "kernel for live frames (UDP fan-out)",
    }
    assert untold <= names_of(checks, ok=None)


def test_files_of_the_wrong_kind_are_findings_too(host: Path) -> None:
    for name in ("proc/self/status", "proc/sys/net/core/somaxconn", "sys/class/net/eth7/mtu"):
        (host / name).unlink()
        (host / name).mkdir()
    assert found(host, "CAP_NET_ADMIN").ok is None
    assert found(host, "net.core.somaxconn").ok is None
    assert "MTU ?" in found(host, "interface eth7").found


@pytest.mark.parametrize(
    ("release", "live_frames", "tcx"),
    [
        ("5.17.9", False, False),
        ("5.18.0", True, False),
        ("6.1.0-37-amd64", True, False),
        ("6.6.1-gentoo", True, True),
        ("6.18.44", True, True),
        ("10.0", True, True),
    ],
)
def test_kernels_are_compared_by_number(
    monkeypatch: pytest.MonkeyPatch, release: str, live_frames: bool, tcx: bool
) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    oks = [check.ok for check in examine() if check.name.startswith("kernel for")]
    assert oks == [live_frames, tcx]


def test_python_newer_than_tested_is_told_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEWEST_PYTHON", (3, 9))
    assert examine()[0].ok is None


def test_all_capabilities_are_held_by_who_has_them(host: Path) -> None:
    assert {name for name in names_of(examine(root=host), ok=True) if name.startswith("CAP_")} == {
        "CAP_NET_ADMIN",
        "CAP_BPF or CAP_SYS_ADMIN",
        "CAP_NET_RAW",
        "CAP_IPC_LOCK",
        "CAP_SYS_NICE",
    }


def test_a_missing_capability_is_named_with_what_wants_it(host: Path) -> None:
    (host / "proc/self/status").write_text(f"CapEff:\t{1 << 12 | 1 << 39:016x}\n")
    assert found(host, "CAP_NET_ADMIN").ok is True
    assert found(host, "CAP_BPF or CAP_SYS_ADMIN").ok is True
    nice = found(host, "CAP_SYS_NICE")
    assert nice.ok is False
    assert "scheduling" in nice.found
    assert "CAP_SYS_NICE" in nice.remedy


def test_headers_in_two_halves_are_whole(host: Path) -> None:
    assert found(host, "kernel headers") == Check("kernel headers", True, f"/lib/modules/{RELEASE}/build")


def test_one_half_of_the_headers_is_not_enough(host: Path) -> None:
    (host / f"lib/modules/{RELEASE}/source/include/uapi/linux").rmdir()
    check = found(host, "kernel headers")
    assert check.ok is False
    assert "include/uapi/linux" in check.found


def test_a_named_headers_tree_counts_alone(host: Path) -> None:
    tree = host / "tree"
    (tree / "include/generated").mkdir(parents=True)
    environ = {"BCC_KERNEL_SOURCE": str(tree)}
    assert found(host, "kernel headers", environ).ok is False
    (tree / "include/uapi/linux").mkdir(parents=True)
    assert found(host, "kernel headers", environ) == Check("kernel headers", True, str(tree))


def test_headers_that_the_kernel_carries_serve_when_there_is_no_package(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.9.9-custom")
    check = found(host, "kernel headers")
    assert check.ok is False
    assert "linux-headers-6.9.9-custom" in check.remedy
    (host / "sys/kernel/kheaders.tar.xz").touch()
    assert found(host, "kernel headers").ok is True


def test_only_the_real_bcc_is_bcc(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = host / "site" / "bcc"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda _: importlib.machinery.PathFinder.find_spec("bcc", [str(package.parent)])
    )
    other = found(host, "bcc")
    assert other.ok is False
    assert "another package" in other.found
    (package / "libbcc.py").touch()
    assert found(host, "bcc") == Check("bcc", True, str(package))


def test_no_bcc_at_all_names_the_package(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check = found(host, "bcc")
    assert check.ok is False
    assert "python3-bpfcc" in check.remedy


@pytest.mark.parametrize(
    ("soft", "ok"), [(1_024, False), (10_000, False), (10_256, True), (resource.RLIM_INFINITY, True)]
)
def test_open_files_are_held_against_ten_thousand_subscribers(
    host: Path, monkeypatch: pytest.MonkeyPatch, soft: int, ok: bool
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, resource.RLIM_INFINITY))
    assert found(host, "open files").ok is ok


def test_locked_memory_needs_no_limit_or_the_capability(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [8 << 20, 8 << 20]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    assert found(host, "locked memory").ok is True
    (host / "proc/self/status").write_text("CapEff:\t0000000000000000\n")
    assert found(host, "locked memory").ok is False
    limits[0] = resource.RLIM_INFINITY
    assert found(host, "locked memory").ok is True


def test_one_cpu_is_too_few(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert found(host, "CPUs").ok is False


def test_a_slow_clock_source_names_the_faster_one_that_is_there(host: Path) -> None:
    folder = host / "sys/devices/system/clocksource/clocksource0"
    assert found(host, "clock source") == Check("clock source", True, "tsc")
    (folder / "current_clocksource").write_text("hpet\n")
    assert found(host, "clock source").remedy == "boot with clocksource=tsc"
    (folder / "available_clocksource").unlink()
    assert found(host, "clock source").ok is False


def test_a_short_accept_queue_is_a_finding(host: Path) -> None:
    (host / "proc/sys/net/core/somaxconn").write_text("128\n")
    assert found(host, "net.core.somaxconn") == Check(
        "net.core.somaxconn", False, "128", "sysctl -w net.core.somaxconn=4096"
    )


def test_an_interface_tells_driver_mtu_and_queues(host: Path) -> None:
    assert found(host, "interface eth7") == Check("interface eth7", None, "igc, MTU 1500, queues 4 in, 2 out, state up")
    assert found(host, "interface lo").ok is None
    assert "interface bonding_masters" not in names_of(examine(root=host), ok=None)


def test_jumbo_frames_are_too_large_for_native_xdp(host: Path) -> None:
    (host / "sys/class/net/eth7/mtu").write_text("9000\n")
    check = found(host, "interface eth7")
    assert check.ok is False
    assert "3498" in check.remedy


def test_a_node_that_listens_and_one_that_does_not_are_told_apart(host: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        up = Address("127.0.0.1", listener.getsockname()[1])
        down = Address("127.0.0.1", closed.getsockname()[1])
        checks = examine([up, down], root=host)[-2:]
    assert [(check.name, check.ok) for check in checks] == [(f"node {up}", True), (f"node {down}", False)]
    assert checks[1].found == "Connection refused"
    assert "BITCOIN_NODE" in checks[1].remedy


def test_a_node_whose_name_means_nothing_is_a_finding(host: Path) -> None:
    checks = examine([Address("no.such.host.invalid", 8333), Address("a" * 64, 8333)], root=host)[-2:]
    assert [check.ok for check in checks] == [False, False]


def test_a_node_that_never_answers_is_given_up(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def hang(*_: object, **__: object) -> socket.socket:
        answer.wait(30)
        raise OSError(113, "No route to host")

    monkeypatch.setattr(doctor, "CONNECT_TIMEOUT_S", 0.01)
    monkeypatch.setattr(socket, "create_connection", hang)
    try:
        checks = examine([Address("192.0.2.1", 8333), Address("192.0.2.2", 8333)], root=host)[-2:]
    finally:
        answer.set()
    assert [check.found for check in checks] == ["no answer within 0.01 s"] * 2

"""The arrows of docs/architecture.md: who may import whom, read from the sources themselves.

An import under `if TYPE_CHECKING:` is no arrow, since it doesn't happen; one inside a function is.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]

# From the top down. A module may import what stands in rows below its own, and, within a package that is named here as
# a whole, the package's own modules; never its neighbours in a row. A package stands for all its modules.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("bench", "cli_keys", "demo", "doctor", "watch"),
    ("cli_reporting",),
    ("app",),
    ("app_memory",),
    ("app_relay", "app_workers"),
    ("app_bypass", "app_zmq"),
    ("egress",),
    ("ingress",),
    ("composition", "uplinks"),
    ("api", "client", "deliveries", "engines", "sources"),
    ("admission", "broadcaster", "ledger", "reassembly", "shared_reader"),
    ("relay",),
    ("config", "known"),
    ("client_udp",),
    ("client_datagrams", "client_retry", "client_waiting"),
    ("client_protocol",),
    ("key_book",),
    ("keys", "settings", "handover", "header_file", "inquiry", "overheard", "regtest", "subscription", "sync"),
    ("binding", "chain", "frames", "datagrams", "arrivals", "status", "ring"),
    ("header_tree", "histograms", "record", "zmq_sockets"),
    ("blocks", "zmq_wire"),
    ("packed_chain",),
    ("bitcoin",),
    (
        "addresses",
        "bypass_line",
        "channels",
        "durations",
        "events",
        "logs",
        "optimize",
        "seats",
        "shared_memory",
        "side_branches",
        "tiers",
    ),
    ("errors",),
    ("",),  # sprint itself: the version
)
COMPOSITION = {
    "app",
    "app_memory",
    "app_relay",
    "app_workers",
    "app_bypass",
    "app_zmq",
    "uplinks",
}  # uplinks: sources.resolver
"""The only ones that know sources, deliveries and the API all at once; benchmarks may take one of them by itself."""
PURE = {
    *("bitcoin", "chain", "header_tree", "packed_chain", "side_branches", "relay", "sync", "record", "ring", "tiers"),
    *("events", "broadcaster", "frames", "durations", "addresses", "errors", "handover", "overheard", "reassembly"),
    *("blocks", "known", "zmq_wire", "arrivals", "client_datagrams", "client_protocol", "datagrams", "subscription"),
}
IMPURE = {"socket", "asyncio", "selectors", "select", "threading", "time", "logging", "structlog"}
MAY_IMPORT_XDP = {
    "sources.capture",
    "deliveries.udp",
    "deliveries.udp_fanout",
    "deliveries.udp_sender",
    "egress",
    "app",
    "app_bypass",
    "ingress",
    "uplinks",
    "doctor",
    "demo",
    "bench",
}


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "sprint").rglob("*.py"))}


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def arrows_of(node: ast.AST, modules: frozenset[str]) -> Iterator[str]:
    """Every module that the code imports; `from package import module` is the module, not the package."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"line {child.lineno}: a relative import; write its full name"
            base = child.module or ""
            for alias in child.names:
                full = f"{base}.{alias.name}"
                yield full if full in modules else base
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for otherwise in child.orelse:
                yield from arrows_of(ast.Module([otherwise], []), modules)
        else:
            yield from arrows_of(child, modules)


def arrows_in(source: str, modules: frozenset[str] = frozenset(MODULES)) -> set[str]:
    return set(arrows_of(ast.parse(source), modules))


ARROWS = {name: arrows_in(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def within(name: str, places: set[str]) -> bool:
    """Whether a module, named as in LAYERS, is one of these or lies in one of these packages."""
    return any(name == place or (place and name.startswith(f"{place}.")) for place in places)


def short(module: str) -> str:
    """A module's name as LAYERS has it: without `sprint.`."""
    return module.removeprefix("sprint").removeprefix(".")


def is_ours(module: str) -> bool:
    return module == "sprint" or module.startswith("sprint.")


def place_of(module: str) -> tuple[int, str]:
    """The row in LAYERS, from 0 at the top, and the entry that a module falls under."""
    for row, places in enumerate(LAYERS):
        for place in places:
            if within(short(module), {place}):
                return row, place
    pytest.fail(
        f"{module} has no place in LAYERS of {Path(__file__).name}: put it in the lowest row that is above all that it"
        " imports, and into docs/architecture.md if it is a part of its own"
    )


def forbidden(module: str, arrows: set[str]) -> list[str]:
    row, place = place_of(module)
    bad = []
    for target in sorted(filter(is_ours, arrows)):
        target_row, target_place = place_of(target)
        if target_row < row or (target_row == row and target_place != place):
            bad.append(f"{module} → {target}: row {row + 1} ({place}) may not import row {target_row + 1}")
    return bad


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_the_layers(module: str) -> None:
    assert not forbidden(module, ARROWS[module])


def test_no_module_has_two_places() -> None:
    places = [place for row in LAYERS for place in row]
    assert len(set(places)) == len(places)


def test_sources_and_deliveries_and_the_api_meet_in_the_composition_only() -> None:
    kinds = {"sources", "deliveries", "api"}
    for module, arrows in ARROWS.items():
        known = {place_of(target)[1] for target in filter(is_ours, arrows)} & kinds
        own = place_of(module)[1]
        if own in kinds:
            assert known <= {own}, f"{module} imports from {known - {own}}"
        elif own == "bench":
            assert len(known) <= 1, f"{module} imports from {known}"
        elif own not in COMPOSITION:
            assert not known, f"{module} imports from {known}; only {sorted(COMPOSITION)} may"


@pytest.mark.parametrize("module", [module for module in MODULES if within(short(module), PURE)])
def test_pure_modules_know_no_socket_no_loop_no_clock_and_no_log(module: str) -> None:
    impure = {target for target in ARROWS[module] if target.partition(".")[0] in IMPURE}
    assert not impure, "time is an argument, and whatever is to be said is returned"


@pytest.mark.parametrize("module", [module for module in MODULES if within(short(module), PURE)])
def test_pure_modules_import_pure_modules_only(module: str) -> None:
    ours = {short(target) for target in ARROWS[module] if is_ours(target)}
    assert not {target for target in ours if target and not within(target, PURE)}


def test_only_those_that_touch_the_network_card_import_xdp() -> None:
    importers = {
        short(module) for module, arrows in ARROWS.items() if any(t.partition(".")[0] == "xdp" for t in arrows)
    }
    assert not {module for module in importers if not within(module, MAY_IMPORT_XDP)}


def test_xdp_imports_nothing_from_sprint() -> None:
    for path in sorted((ROOT / "xdp").rglob("*.py")):
        assert not set(filter(is_ours, arrows_in(path.read_text(encoding="utf-8")))), path.name


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle, in order, or nothing."""
    path: list[str] = []
    done: set[str] = set()

    def visit(module: str) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        path.append(module)
        for target in sorted(graph.get(module, ())):
            if target != module and (found := visit(target)):
                return found
        done.add(path.pop())
        return []

    return next(filter(None, map(visit, graph)), [])


def test_there_is_no_cycle_of_imports() -> None:
    """Not even one that an import inside a function hides."""
    assert not cycle_in(ARROWS)


def test_every_arrow_within_sprint_leads_to_a_module_that_exists() -> None:
    targets = {target for arrows in ARROWS.values() for target in arrows if is_ours(target)}
    missing = sorted(targets - set(MODULES))
    assert not missing


# The test's own tools can tell


def test_what_counts_as_an_arrow() -> None:
    source = """
import os.path
from sprint import __version__, logs
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import socket
    if True:
        import select
else:
    import asyncio
try:
    import selectors
except ImportError:
    pass
class A:
    import logging
    async def f(self):
        with open("x"):
            import time
"""
    assert arrows_in(source) == {
        "os.path",
        "sprint",
        "sprint.logs",
        "typing",
        "asyncio",
        "selectors",
        "logging",
        "time",
    }


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("sprint.cli", "sprint.app", True),
        ("sprint.app", "sprint.cli", False),
        ("sprint.deliveries.stream", "sprint.deliveries.hello", True),
        ("sprint.deliveries.stream", "sprint.sources.p2p", False),
        ("sprint.sources.p2p", "sprint.deliveries.stream", False),
        ("sprint.relay", "sprint.ledger", False),
        ("sprint.ledger", "sprint.broadcaster", False),
        ("sprint.ring", "sprint.chain", False),
        ("sprint.errors", "sprint", True),
        ("sprint.errors", "sprint.events", False),
        ("sprint.errors", "socket", True),
    ],
)
def test_an_arrow_up_or_sideways_is_forbidden(module: str, target: str, allowed: bool) -> None:
    assert (not forbidden(module, {target})) is allowed


def test_a_module_without_a_place_fails_and_says_what_to_do() -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"sprint\.gossip has no place in LAYERS .* put it in the lowest row"
    ):
        place_of("sprint.gossip")


def test_a_cycle_is_found() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []

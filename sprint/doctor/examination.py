"""All checks, each in a thread of its own: one that hangs or fails becomes its own line, and the others go on."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sprint.doctor import bypass, flows, host, interfaces, nodes, running
from sprint.doctor.findings import Finding, Need, State, bypass_request, verdict
from xdp.loader import TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sprint.config import Config

SHORT_S, LONG_S = 5.0, 10.0
"""How long a check may take that reads files, and one that asks the kernel or the network."""


class Check(NamedTuple):
    """One of the doctor's questions."""

    name: str
    ask: Callable[[], list[Finding]]
    limit_s: float
    need: Need | None = None
    """What can't be told to be there if this has no answer."""
    heavy: bool = False
    """It keeps a CPU busy for seconds: its turn comes when the others have answered, which measure time."""


def examine(
    config: Config, *, quick: bool = False, root: Path = Path("/"), environ: Mapping[str, str] = os.environ
) -> list[Finding]:
    """Every finding on this host, the verdict last. Raises nothing; takes about 3 s, or 0.5 with `quick`.

    `quick` leaves out what takes longest, compiling the bypass's programs. `root` is where files of /proc, /sys and
    /lib are looked for.
    """
    findings = run(_checks(config, quick, root, environ))
    return [*findings, verdict(findings, config)]


def _checks(config: Config, quick: bool, root: Path, environ: Mapping[str, str]) -> list[Check]:
    def on_host(question: Callable[[Path], list[Finding]]) -> Callable[[], list[Finding]]:
        return lambda: question(root)

    def ask() -> running.RunningBypass | None:
        return running.ask(config.api_bind)

    return [
        *(Check(name, on_host(question), SHORT_S) for name, question in host.CHECKS.items()),
        Check("kernel", bypass.kernel_version, SHORT_S),
        Check("kernel features", lambda: bypass.features(config), LONG_S, Need.BYPASS),
        *(Check(name, on_host(question), SHORT_S) for name, question in bypass.SETTINGS.items()),
        Check("bcc", bypass.compiler, SHORT_S, Need.BYPASS),
        Check("kernel headers", lambda: bypass.kernel_headers(root, environ), SHORT_S, Need.BYPASS),
        Check("kernel bypass", lambda: [bypass_request(config)], SHORT_S),
        Check("programs", lambda: bypass.programs(config, quick=quick), TIMEOUT_S + SHORT_S, Need.BYPASS, heavy=True),
        Check("interfaces", lambda: interfaces.interfaces(config, ask()), LONG_S, Need.BYPASS),
        Check("leftovers", bypass.left_behind, LONG_S),
        Check("flows", lambda: flows.flows(root, config, ask), LONG_S),
        Check("nodes", lambda: nodes.nodes(config), LONG_S, Need.FEED),
    ]


def run(checks: Sequence[Check]) -> list[Finding]:
    """All at once but the heavy ones; the findings in the order of the checks."""
    answers: dict[int, list[Finding]] = {}

    def ask(number: int, check: Check) -> None:
        try:
            answers[number] = check.ask()
        except Exception as error:  # whatever goes wrong in one is a finding
            said = f"could not be examined: {type(error).__name__}: {error}"
            answers[number] = [Finding(check.name, "", State.UNKNOWN, said, "report this: it is a bug", check.need)]

    for heavy in (False, True):
        asked = [(number, check) for number, check in enumerate(checks) if check.heavy is heavy]
        # Daemons: one that hangs in the kernel must not keep the doctor from leaving.
        threads = [threading.Thread(target=ask, args=each, daemon=True) for each in asked]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        for thread, (_, check) in zip(threads, asked, strict=True):
            thread.join(max(0.0, begun + check.limit_s - time.monotonic()))
    findings: list[Finding] = []
    for number, check in enumerate(checks):
        said = f"no answer within {check.limit_s:g} s"
        late = Finding(check.name, "", State.UNKNOWN, said, "try once more", check.need)
        findings += answers.get(number, [late])
    return findings

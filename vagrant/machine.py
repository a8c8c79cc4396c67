"""One kernel's machine: booted by virtme-ng on qemu, watched line by line, and ended with us, however we end.

As root everything runs in a PID namespace whose first process dies with us, so that not even SIGKILL leaves a qemu
behind. The guest sees the host's files read-only, and a copy of the checkout in the place of the checkout; what the
tools write on the way lies in a folder that is removed afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vagrant import reports

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

CPUS = 2  # a relay that is pinned, and the rest
MEMORY = "4G"  # the compiler in bcc, a bcoin node and the product side by side
EMULATED_SLOWNESS = 40
"""Measured: loading capture.c takes 2.3 s here, and 45 to 130 in a machine that shares both cores with others."""
LAST_LINES = 12
"""Of what it printed, told when it ended before its tests did."""
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".cache", "node_modules", "__pycache__", ".*_cache", ".hypothesis", ".vagrant", "dist"
)
_PR_SET_PDEATHSIG = 1
_SHARE = "-fsdev local,id=sprint,path=/,security_model=none,readonly=on,multidevs=remap"
_SHARE_DEVICE = "-device virtio-9p-pci,fsdev=sprint,mount_tag=sprint"


@dataclass(frozen=True, slots=True)
class Host:
    """Where things are here."""

    root: Path
    """The checkout."""
    vng: Path
    """virtme-ng's command, its other tools beside it."""
    work: Path
    """A folder of this run's own."""
    kvm: bool = False
    """Let the processor's virtualisation be used; else qemu emulates everything."""

    @property
    def slowness(self) -> int:
        """By how much longer the tests are to wait for anything."""
        return 1 if self.kvm else EMULATED_SLOWNESS

    def snapshot(self) -> Path:
        """A copy of the checkout's own files, which nobody edits while the tests run."""
        copy = self.work / "checkout"
        shutil.copytree(self.root, copy, symlinks=True, ignore=NOT_COPIED)
        return copy


def command(host: Host, snapshot: Path, release: str, folder: Path, pytest: Sequence[str]) -> list[str]:
    """virtme-ng's, for a kernel that is unpacked in `folder`. The NIC's network is qemu's own, and leads nowhere."""
    guest = ["bash", snapshot / "vagrant" / "guest.sh", host.root, snapshot, folder, host.slowness, *pytest]
    words: list[object] = [host.vng, "--run", folder / "boot" / f"vmlinuz-{release}"]
    words += ["--force-9p", "--user", "root", "--cpus", str(CPUS), "--memory", MEMORY]
    words += ["--network", "user", f"--qemu-opts={_SHARE} {_SHARE_DEVICE}"]
    words += [] if host.kvm else ["--disable-kvm"]
    words += ["--exec", shlex.join(map(str, guest))]
    return list(map(str, words))


def environment(host: Host) -> dict[str, str]:
    """virtme-ng finds its other tools on PATH, and keeps settings and caches in what it takes for home."""
    home = host.work / "home"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "VIRTME", "PYTHON"))}
    return kept | {"PATH": f"{host.vng.parent}:{os.environ['PATH']}", "HOME": str(home), "TMPDIR": str(home)}


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def run(
    words: Sequence[str], env: dict[str, str], log: Path, timeout_s: float, take: Callable[[dict[str, object]], None]
) -> str | None:
    """Run a machine to its end, everything that it prints going to the log, and each line of its report to `take`.

    Returns why its end was no proper one, None if it was.
    """
    if os.geteuid() == 0:
        # The kernel ends what is in there as soon as the first of them has ended.
        words = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--", *words]
    began, last, ended = time.monotonic(), deque[str](maxlen=LAST_LINES), False
    with log.open("w", encoding="utf-8") as record:
        # The child only calls prctl before it becomes the command: no lock of another thread can be needed.
        machine = subprocess.Popen(  # noqa: S603 - virtme-ng's own command
            words,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - see above
            text=True,
            errors="replace",
        )

        def end() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(machine.pid, signal.SIGKILL)

        timer = threading.Timer(timeout_s, end)
        timer.start()
        try:
            assert machine.stdout is not None
            for line in machine.stdout:
                record.write(line)
                record.flush()
                said = reports.parse(line)
                if said is None:
                    last.append(line.rstrip())
                    continue
                ended |= "ended" in said
                take(said)
            machine.wait()
        finally:
            timer.cancel()
            end()
            machine.wait()
            if machine.stdout is not None:
                machine.stdout.close()
    if ended:
        return None
    if time.monotonic() - began >= timeout_s:
        return f"stopped after {timeout_s / 60:g} minutes"
    shown = "\n".join(f"    {line}" for line in last if line)
    return f"the machine ended before its tests did (status {machine.returncode}):\n{shown}"

"""Fetches and unpacks kernels: apt with sources, lists and cache of its own, dpkg-deb, and nothing of it installed.

The system's apt settings that concern the network (proxies, certificates) hold; its sources, pins and lists stay as
they are. What comes is checked by apt against Debian's keyring. A kernel's folder appears when it is whole.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

from vagrant import kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

ROOM_BYTES = 3 << 30
"""Asked for before a kernel is fetched: the packages are 190 MB at most, what is unpacked of them 500."""
LISTS_MAX_AGE_S = 86_400.0
APT_TIMEOUT_S = 900


class FetchError(Exception):
    """A kernel can't be had; the message is one line that names it and the reason."""


class Apt:
    """apt on a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("lists/partial", "cache/archives/partial", "sources.list.d", "preferences.d"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        self._lists = folder / "lists.fetched"
        settings = {
            "Dir::State": folder,
            "Dir::State::Lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "Dir::Etc::SourceList": folder / "sources.list",
            "Dir::Etc::SourceParts": folder / "sources.list.d",
            "Dir::Etc::Preferences": folder / "preferences",
            "Dir::Etc::PreferencesParts": folder / "preferences.d",
            "Acquire::Languages": "none",
            "APT::Architecture": kernels.FLAVOUR,
            # Its folders belong to whoever runs this, and user _apt may not write there.
            "APT::Sandbox::User": "root",
        }
        self._options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]

    def _run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return _run([command[0], *self._options, *command[1:]], cwd)

    def update(self, now_s: float) -> None:
        """The archives' lists, at most a day old. Raises FetchError only when there are none at all."""
        text = kernels.sources(_system_archives())
        current = self._folder / "sources.list"
        fresh = self._lists.exists() and now_s - self._lists.stat().st_mtime < LISTS_MAX_AGE_S
        if fresh and current.exists() and current.read_text(encoding="utf-8") == text:
            return
        current.write_text(text, encoding="utf-8")
        done = self._run("apt-get", "-q", "update")
        if not self.names():
            raise FetchError(f"the lists of Debian's archives can't be fetched: {_last_line(done)}")
        if done.returncode == 0:
            self._lists.touch()

    def names(self) -> list[str]:
        """Every package of the archives."""
        return self._run("apt-cache", "pkgnames", "linux-").stdout.split()

    def download(self, packages: Sequence[str], folder: Path) -> list[Path]:
        """Their files, in that folder. Raises FetchError."""
        done = self._run("apt-get", "-q", "download", *packages, cwd=folder)
        files = sorted(folder.glob("*.deb"))
        if done.returncode or len(files) != len(packages):
            raise FetchError(f"{' '.join(packages)} can't be fetched: {_last_line(done)}")
        return files


def _run(command: Sequence[str | Path], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - the system's apt and dpkg, with words of our own
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=APT_TIMEOUT_S, check=False
    )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def _system_archives() -> dict[str, str]:
    form = ["--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages", "Origin: Debian"]
    return kernels.archives_of(_run(["apt-get", "indextargets", *form]).stdout)


def fetch(asked: str, apt: Apt, cache: Path, say: Callable[[str], None]) -> tuple[str, Path]:
    """A kernel's release and the folder that it is unpacked in, fetched if it isn't there. Raises FetchError."""
    names = apt.names()
    kernel = kernels.choose(asked, names)
    if kernel is None:
        raise FetchError(f"kernel {asked}: Debian's archives have {', '.join(kernels.series(names)) or 'none'}")
    folder = cache / kernel.release
    if (folder / "boot").is_dir():
        return kernel.release, folder
    free = shutil.disk_usage(cache).free
    if free < ROOM_BYTES:
        raise FetchError(f"kernel {asked}: {free >> 20} MB free in {cache}, expected {ROOM_BYTES >> 20}")
    building = cache / f"{kernel.release}.new"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    say(f"fetching {', '.join(kernel.packages)}")
    try:
        for package in apt.download(kernel.packages, building):
            done = _run(["dpkg-deb", "-x", package, building])
            if done.returncode:
                raise FetchError(f"{package.name} can't be unpacked: {_last_line(done)}")
            package.unlink()
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return kernel.release, folder

"""Which Debian packages make up a kernel, and what apt needs to fetch them without touching the system's settings.

Pure: names in, names and texts out. A kernel is asked for as `6.1` (the newest of that series which the archives have)
or by its whole release, `6.12.117+deb12`. Only the flavour for ordinary machines is taken, never cloud or rt, and only
what Debian signed; the packages are never installed, but unpacked.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

FLAVOUR = "amd64"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEFAULT_ARCHIVES = {
    "debian": "http://deb.debian.org/debian",
    "debian-security": "http://deb.debian.org/debian-security",
}
"""Where the system's own sources name none, as on Ubuntu. Plain HTTP is Debian's default: apt checks signatures."""
SUITES = (
    ("debian", "bookworm"),
    ("debian-security", "bookworm-security"),
    ("debian", "bookworm-backports"),
    ("debian", "trixie"),
    ("debian-security", "trixie-security"),
    ("debian", "trixie-backports"),
)
"""Debian 12 has 6.1, 13 has 6.12, backports have what came after; a suite that has left the mirror is passed by."""
_ASKED = re.compile(r"\d+\.\d+(\.\d[\w.+~-]*)?")
# 6.1.0-56 and 6.12.117+deb13.1; not the metapackage 6.12, and no further hyphen, which would begin a flavour.
_IMAGE = re.compile(rf"linux-image-(\d+\.\d+\.\d+(?:-\d[\d.]*|\+[\w.~]+)?)-{FLAVOUR}")


class Kernel(NamedTuple):
    """A kernel that the archives have."""

    release: str
    """As `uname -r` says it in there, `6.1.0-56-amd64`."""
    packages: tuple[str, ...]
    """Its image with modules, and its headers, which bcc compiles with."""


def is_kernel(asked: str) -> bool:
    """Whether that is a kernel's series or release, by its form."""
    return _ASKED.fullmatch(asked) is not None


def sources(archives: dict[str, str]) -> str:
    """A sources.list with every suite, from the mirrors given by the archive's name."""
    urls = DEFAULT_ARCHIVES | archives
    return "".join(f"deb [signed-by={KEYRING}] {urls[archive]} {suite} main\n" for archive, suite in SUITES)


def archives_of(index_targets: str) -> dict[str, str]:
    """The mirrors that the system uses, from `apt-get indextargets` with the label and the URI on each line.

    Only those that Debian's label is on: a vendor's own archive may well hold a `linux-image`.
    """
    names = {"Debian": "debian", "Debian-Security": "debian-security"}
    found: dict[str, str] = {}
    for line in index_targets.splitlines():
        label, _, uri = line.partition(" ")
        if label in names and uri:
            found.setdefault(names[label], uri.strip().rstrip("/"))
    return found


def _order(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)]


def choose(asked: str, names: Iterable[str]) -> Kernel | None:
    """The newest kernel of that series, or that very release, with the packages it is made of; None if there is none.

    `names` are all packages of the archives. Of the same version for two Debians the later one's is taken.
    """
    names = set(names)
    releases = [found.group(1) for found in map(_IMAGE.fullmatch, names) if found]
    if not is_kernel(asked):
        return None
    bare = asked.removesuffix(f"-{FLAVOUR}")
    fitting = [release for release in releases if release == bare or re.match(re.escape(bare) + r"[.]\d", release)]
    if not fitting:
        return None
    release = max(fitting, key=_order)
    # From 6.19 on the image is an empty package that depends on the two halves.
    wanted = [f"linux-{part}-{release}-{FLAVOUR}" for part in ("image", "binary", "modules", "headers")]
    wanted.append(f"linux-headers-{release}-common")
    return Kernel(f"{release}-{FLAVOUR}", tuple(name for name in wanted if name in names))


def series(names: Iterable[str]) -> list[str]:
    """What could have been asked for, `6.1` and on, the oldest first."""
    found = {".".join(match.group(1).split(".")[:2]) for match in map(_IMAGE.fullmatch, names) if match}
    return sorted(found, key=_order)

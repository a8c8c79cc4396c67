"""vagrant/kernels.py: which packages a kernel is, out of names that Debian's archives have had."""

from __future__ import annotations

import pytest

from vagrant import kernels

NAMES = [
    *("linux-image-amd64", "linux-image-6.12-amd64", "linux-image-cloud-amd64", "linux-headers-amd64"),
    *(f"linux-image-6.1.0-{number}-amd64" for number in (9, 47, 56)),
    *("linux-image-6.1.0-57-cloud-amd64", "linux-image-6.1.0-58-rt-amd64", "linux-image-6.1.0-59-amd64-unsigned"),
    *("linux-image-6.1.0-56-amd64-dbg", "linux-headers-6.1.0-56-amd64", "linux-headers-6.1.0-56-common"),
    *("linux-headers-6.1.0-56-common-rt", "linux-kbuild-6.1", "linux-image-6.10.9+bpo-amd64"),
    *("linux-image-6.12.9+deb12-amd64", "linux-image-6.12.117+deb12-amd64", "linux-image-6.12.117+deb13-amd64"),
    *("linux-image-6.12.90+deb13.1-amd64", "linux-image-6.12.118+deb12-cloud-amd64"),
    *("linux-headers-6.12.117+deb13-amd64", "linux-headers-6.12.117+deb13-common"),
    *("linux-image-7.3.4+deb13-amd64", "linux-binary-7.3.4+deb13-amd64", "linux-modules-7.3.4+deb13-amd64"),
    *("linux-binary-unsigned-7.3.4+deb13-amd64", "linux-headers-7.3.4+deb13-amd64", "linux-headers-7.3.4+deb13-common"),
]


@pytest.mark.parametrize(
    ("asked", "release"),
    [
        ("6.1", "6.1.0-56-amd64"),
        ("6.1.0-47", "6.1.0-47-amd64"),
        ("6.1.0-47-amd64", "6.1.0-47-amd64"),
        ("6.10", "6.10.9+bpo-amd64"),
        ("6.12", "6.12.117+deb13-amd64"),
        ("6.12.117+deb12", "6.12.117+deb12-amd64"),
        ("7.3", "7.3.4+deb13-amd64"),
    ],
)
def test_a_series_is_its_newest_ordinary_signed_kernel_and_a_release_is_itself(asked: str, release: str) -> None:
    kernel = kernels.choose(asked, NAMES)
    assert kernel is not None
    assert kernel.release == release


@pytest.mark.parametrize("asked", ["6.2", "6", "6.1.0-5", "6.12.117", "7.3.4"])
def test_what_the_archives_have_not_is_none(asked: str) -> None:
    assert kernels.choose(asked, NAMES) is None


def test_a_kernel_s_packages_are_its_image_in_one_or_three_and_both_halves_of_its_headers() -> None:
    old, new = kernels.choose("6.1", NAMES), kernels.choose("7.3", NAMES)
    assert old is not None
    assert new is not None
    assert old.packages == (
        "linux-image-6.1.0-56-amd64",
        "linux-headers-6.1.0-56-amd64",
        "linux-headers-6.1.0-56-common",
    )
    assert new.packages == (
        *(f"linux-{part}-7.3.4+deb13-amd64" for part in ("image", "binary", "modules", "headers")),
        "linux-headers-7.3.4+deb13-common",
    )


def test_the_series_are_told_in_the_order_of_their_numbers() -> None:
    assert kernels.series(NAMES) == ["6.1", "6.10", "6.12", "7.3"]


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        *((text, True) for text in ("6.1", "6.12", "6.12.117+deb12", "6.1.0-56", "6.1.0-56-amd64")),
        *((text, False) for text in ("6", "v6.1", "", "6.1; reboot", "../6.1", "6.1.", "--json")),
    ],
)
def test_only_a_series_or_a_release_is_a_kernel(text: str, is_one: bool) -> None:
    assert kernels.is_kernel(text) is is_one


def test_sources_name_every_suite_with_debian_s_keyring_and_the_system_s_own_mirror() -> None:
    lines = kernels.sources({"debian": "https://mirror.example/debian"}).splitlines()
    assert len(lines) == len(kernels.SUITES)
    assert all(f"signed-by={kernels.KEYRING}]" in line for line in lines)
    assert "https://mirror.example/debian bookworm-backports main" in lines[2]
    assert kernels.DEFAULT_ARCHIVES["debian-security"] in lines[1]


def test_the_system_s_mirrors_are_those_with_debian_s_label_the_first_of_each() -> None:
    told = (
        "Debian http://mirror.example/debian/\nDebian http://second.example/debian/\n"
        "Debian-Security http://security.example/debian-security/\nVendor http://vendor.example/debian/\n\n"
    )
    assert kernels.archives_of(told) == {
        "debian": "http://mirror.example/debian",
        "debian-security": "http://security.example/debian-security",
    }
    assert kernels.archives_of("") == {}

"""README.md and docs/ say what is true: the command's help, the tiers, the links, the commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sprint.durations import format_duration
from sprint.tiers import NS_PER_MS, PROFILES, Tier

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def sprint(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "sprint", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_the_readme_shows_the_help_that_the_command_prints() -> None:
    shown = re.search(r"\$ sprint --help\n(.*?)\n```", README, re.DOTALL)
    assert shown is not None
    assert shown.group(1).rstrip() == sprint("--help").stdout.rstrip()


def test_the_readme_names_every_command_of_the_help() -> None:
    listed = re.findall(r"^  ([a-z]+) ", sprint("--help").stdout.partition("Commands:")[2], re.MULTILINE)
    assert set(listed) == {"run", "watch", "status", "doctor", "demo", "bench", "keys"}


@pytest.mark.parametrize("tier", list(Tier), ids=lambda tier: tier.label)
def test_the_readme_has_each_tier_as_the_code_has_it(tier: Tier) -> None:
    profile = PROFILES[tier]
    row = next(line for line in README.splitlines() if line.startswith(f"| {tier.label} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == [
        f"{profile.relay_target_ns // NS_PER_MS} ms",
        format_duration(profile.write_deadline_ns),
        str(profile.ring_slots),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_sprint_command_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    used = set(re.findall(r"(?:\./run sprint|`sprint|^sprint|\$ sprint) ([a-z]+)", text, re.MULTILINE))
    assert used <= {"run", "watch", "status", "doctor", "demo", "bench", "keys"}


def test_the_exit_codes_of_the_troubleshooting_page_are_true(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    line = "sprint: TIER=bogus: expected one of free, pro, business, turbo, enterprise"
    assert f"| 2 | a bad value; the line names the variable | `{line}` |" in page
    refused = subprocess.run(
        [sys.executable, "-m", "sprint", "run"],
        capture_output=True,
        text=True,
        env={**os.environ, "TIER": "bogus"},
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert (refused.returncode, refused.stderr) == (2, line + "\n")

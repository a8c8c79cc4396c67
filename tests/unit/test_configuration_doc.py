"""docs/configuration.md says what the code does: its table, its examples and its error lines are tried out here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sprint.bitcoin.networks import NETWORKS
from sprint.config import ENV_FILE, MAX_ENV_FILE_SIZE, load
from sprint.durations import format_duration
from sprint.errors import ConfigError
from sprint.settings import MAX_UPSTREAMS, Settings, variables
from sprint.tiers import PROFILES, Tier

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```ini\n(.*?)```", PAGE, re.DOTALL)
REFUSALS = re.findall(r"^\$ (\S+) \./run sprint run\n(sprint: .*)$", PAGE, re.MULTILINE)
SWITCHES = [name.upper() for name, field in Settings.model_fields.items() if "bool" in str(field.annotation)]


def rows_under(heading: str) -> list[list[str]]:
    """The cells of the first table behind a line that begins so, without its heading."""
    table = re.search(rf"^{re.escape(heading)}.*?\n\|[-|]+\|\n(.*?)\n\n", PAGE, re.DOTALL | re.MULTILINE)
    assert table is not None, f"no table under {heading!r}"
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.group(1).splitlines()]


def test_the_table_has_every_variable_with_its_default_and_description() -> None:
    documented = [(name.strip("`"), default, text) for name, default, text in rows_under("# Configuration")]
    assert documented == [(variable.name, variable.default, variable.description) for variable in variables()]


def test_the_defaults_of_each_tier_are_the_tiers_own() -> None:
    defaults = {variable.name: variable.default for variable in variables()}
    for tier, profile in PROFILES.items():
        assert f"{tier.label} {format_duration(profile.write_deadline_ns)}" in defaults["WRITE_DEADLINE"]
        assert f"{tier.label} {profile.ring_slots}" in defaults["BLOCK_BUFFER_SIZE"]


def test_every_tier_has_an_example() -> None:
    documented = {match[1] for example in EXAMPLES if (match := re.search(r"^TIER=(\w+)$", example, re.MULTILINE))}
    assert documented == {tier.label for tier in Tier}


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_a_good_file_without_a_warning(example: str, tmp_path: Path) -> None:
    (tmp_path / ENV_FILE).write_text(example, encoding="utf-8")
    loaded = load({}, tmp_path)
    assert loaded.warnings == ()
    assert f"TIER={loaded.tier.label}" in example


def test_the_example_of_precedence_comes_out_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / ENV_FILE).write_text(EXAMPLES[0], encoding="utf-8")
    loaded = load({"TIER": "enterprise"}, tmp_path)
    assert (loaded.tier, loaded.write_deadline_ns, loaded.ring_slots) == (Tier.ENTERPRISE, 700_000, 4_096)


def test_the_page_shows_refusals() -> None:
    assert len(REFUSALS) >= 4


@pytest.mark.parametrize(("setting", "line"), REFUSALS)
def test_a_bad_value_gives_the_line_that_the_page_shows(setting: str, line: str, tmp_path: Path) -> None:
    name, _, value = shlex.split(setting)[0].partition("=")
    with pytest.raises(ConfigError) as caught:
        load({name: value}, tmp_path)
    assert f"sprint: {caught.value}" == line


def test_the_warning_that_the_page_shows_is_the_real_one(tmp_path: Path) -> None:
    (tmp_path / ENV_FILE).write_text("TEIR=turbo\n", encoding="utf-8")
    (warning,) = load({}, tmp_path).warnings
    assert f"\n{warning}\n" in PAGE


def test_the_page_says_of_every_switch_what_it_does() -> None:
    assert {row[0].strip("`") for row in rows_under("## What the switches do")} == set(SWITCHES)
    assert len(SWITCHES) == 5


def test_limits_and_ports_are_the_code_s() -> None:
    text = " ".join(PAGE.split())
    assert f"takes up to {MAX_UPSTREAMS}, each once" in text
    assert f"at most {MAX_ENV_FILE_SIZE // 1024} KiB" in text
    assert ", ".join(f"{name} {network.port}" for name, network in NETWORKS.items()) in text

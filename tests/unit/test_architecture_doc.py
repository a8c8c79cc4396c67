"""docs/architecture.md says where things are: every module stands in its table once, and nothing that isn't there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = re.compile("`([^`]+)`")


def listed() -> Counter[str]:
    """Each module of the table, by its path without its ending, but for headers in C."""
    section = PAGE.partition("\n## Where things are\n")[2].partition("\n## ")[0]
    found: Counter[str] = Counter()
    for row in section.splitlines():
        cells = row.strip("|").split(" | ")
        if len(cells) == 3 and (folder := NAMED.fullmatch(cells[1].strip())):
            found.update(f"{folder[1]}{name}" for name in NAMED.findall(cells[2]))
    return found


def present() -> set[str]:
    files = [file for folder in ("sprint", "xdp") for file in (ROOT / folder).rglob("*.*")]
    modules = {file for file in files if file.suffix in {".py", ".c"} and not file.name.startswith("__")}
    headers = {file for file in files if file.suffix == ".h"}
    names = {file.with_suffix("") for file in modules} | headers
    return {str(name.relative_to(ROOT)) for name in names}


def test_every_module_stands_in_the_table() -> None:
    missing = present() - set(listed())
    assert not missing, f"not in docs/architecture.md, 'Where things are': {sorted(missing)}"


def test_nothing_in_the_table_is_gone_or_stands_there_twice() -> None:
    assert set(listed()) - present() == set()
    assert [name for name, times in listed().items() if times > 1] == []


def test_files_that_the_page_names_are_there() -> None:
    roots = [
        ROOT,
        ROOT / "sprint",
        ROOT / "xdp",
        ROOT / "xdp/bpf",
        ROOT / "tests",
        ROOT / "tests/net",
        ROOT / "tests/real",
    ]
    roots += [ROOT / "sprint" / folder for folder in ("engines", "doctor", "bench")]
    named = set(re.findall(r"`([\w/*]+\.(?:py|c|h|toml))`", PAGE))
    assert {name for name in named if not any(list(root.glob(name)) for root in roots)} == set()

"""`./run bench fanout` and the redis-server that it is measured beside: unpacked into .cache, never installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_run_script import Project, make_project

pytestmark = [
    pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs the system's Python"),
    pytest.mark.skipif(Path("/usr/bin/redis-server").exists(), reason="this machine has a redis-server of its own"),
]

# What an archive with one package of Redis would say and do.
FAKES = {
    "apt-get": """
echo "$*" >>"$FAKES/apt.log"
[[ ! -e "$FAKES/offline" ]] || exit 100
case " $* " in
*" -s "*install*) echo "Inst redis-server (7 somewhere [amd64])"; echo "Conf redis-server (7 somewhere [amd64])" ;;
*" download "*) touch redis-server_7_amd64.deb ;;
esac
""",
    "dpkg-deb": """
mkdir -p usr/bin
printf '#!/bin/sh\\necho "a stand-in: $*"\\n' >usr/bin/redis-server
chmod +x usr/bin/redis-server
""",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = make_project(tmp_path_factory.mktemp("redis"))
    for name, body in FAKES.items():
        (made.fakes / name).write_text(f"#!/bin/bash\n{body}\n")
        (made.fakes / name).chmod(0o755)
    # As on a machine that has none: nothing of its own comes before the fakes.
    (made.root / "sprint" / "cli.py").write_text(
        "import shutil, subprocess\n"
        "def main():\n"
        "    found = shutil.which('redis-server')\n"
        "    print(found and subprocess.run([found, 'x'], capture_output=True, text=True).stdout.strip(), flush=True)\n"
    )
    return made


def cache(project: Project) -> Path:
    return project.root / ".cache"


def test_without_an_archive_the_benchmark_runs_without_it_and_asks_again_after_an_hour_only(project: Project) -> None:
    (project.fakes / "offline").touch()
    done = project.run("bench", "fanout")
    assert (done.returncode, done.stdout) == (0, "None\n")
    assert "no redis-server; stays off: Redis in bench fanout" in done.stderr
    calls = len(project.apt_calls)
    again = project.run("bench", "fanout")
    assert (again.returncode, again.stderr, len(project.apt_calls)) == (0, "", calls)
    (project.fakes / "offline").unlink()
    (cache(project) / "redis-refused").unlink()


def test_it_is_unpacked_once_found_by_the_benchmark_and_not_installed(project: Project) -> None:
    project.says("apt.log")
    done = project.run("bench", "fanout")
    assert (done.returncode, done.stdout) == (0, "a stand-in: x\n")
    assert "unpacking redis-server into .cache" in done.stderr
    assert [call for call in project.apt_calls if "install" in call and "-s" not in call] == []
    assert not (cache(project) / "redis.new").exists()
    assert list((cache(project) / "redis").glob("*.deb")) == []
    project.says("apt.log")
    again = project.run("bench", "fanout")
    assert (again.stdout, again.stderr, project.apt_calls) == ("a stand-in: x\n", "", [])


def test_other_benchmarks_do_not_ask_for_it(project: Project) -> None:
    project.says("apt.log")
    assert project.run("bench", "wire").stdout == "None\n"
    assert project.apt_calls == []

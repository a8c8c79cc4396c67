"""`./run` on a project of a few lines, without network: what is installed when, what is said, what is recovered.

The virtual environments are real and made by the system's Python; who the user is and what apt has are told by fakes
that come first on PATH, so that no package of this machine is touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "run"
pytestmark = pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs the system's Python")

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "stand-in"
version = "1"
"""

# The smallest build backend that pip can install an editable project with (PEP 517, PEP 660).
BACKEND = """
import pathlib, zipfile

def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "stand_in-1-py3-none-any.whl"
    info = "stand_in-1.dist-info/"
    with zipfile.ZipFile(pathlib.Path(directory) / name, "w") as wheel:
        wheel.writestr("stand_in.pth", str(pathlib.Path.cwd()))
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: stand-in\\nVersion: 1\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "entry_points.txt", "[console_scripts]\\nsprint = sprint.cli:main\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""

CLI = """
import os, signal, sys

def main():
    print(os.getpid(), *sys.argv[1:], flush=True)
    if "wait" in sys.argv:
        signal.pause()
"""

FAKES = {
    "id": 'case "$1" in -u) cat "$FAKES/uid" ;; *) echo somebody ;; esac',
    "dpkg-query": 'grep -qx "${!#}" "$FAKES/installed" && echo "ii "',
    "dpkg": "echo amd64",
    "apt-cache": "exit 0",
    # The last line of each call goes to the log; what the archive lacks makes the whole call fail, as apt does.
    "apt-get": """
echo "${DEBIAN_FRONTEND:-} $*" >>"$FAKES/apt.log"
[[ " $* " == *" install "* ]] || exit 0
for package in "$@"; do ! grep -qx -- "$package" "$FAKES/refused" || exit 100; done
printf '%s\\n' "$@" >>"$FAKES/installed"
""",
}


@dataclass
class Project:
    """A copy of `run` with a stand-in for the product, and what its fakes say."""

    root: Path
    fakes: Path

    @property
    def home(self) -> Path:
        return self.fakes / "home"

    def env(self) -> dict[str, str]:
        kept = {"LANG", "TMPDIR"}
        return {k: v for k, v in os.environ.items() if k in kept} | {
            "HOME": str(self.home),
            "PATH": f"{self.fakes}:/usr/sbin:/usr/bin:/sbin:/bin",
            "FAKES": str(self.fakes),
            "BCC_KERNEL_SOURCE": "/nowhere",  # the answer to kernel headers, which this machine may have or not
            "PIP_NO_INDEX": "1",
        }

    def command(self, *arguments: str) -> list[str]:
        return [str(self.root / "run"), *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.env(),
            cwd=self.fakes,
            text=True,
            capture_output=True,
            check=False,
            timeout=120,
        )

    def says(self, name: str, *lines: str) -> None:
        (self.fakes / name).write_text("".join(f"{line}\n" for line in lines))

    @property
    def apt_calls(self) -> list[str]:
        return (self.fakes / "apt.log").read_text().splitlines()


def make_project(folder: Path) -> Project:
    project = Project(folder / "project", folder / "fakes")
    (project.root / "sprint").mkdir(parents=True)
    project.home.mkdir(parents=True)
    shutil.copy(RUN, project.root / "run")
    (project.root / "pyproject.toml").write_text(PYPROJECT)
    (project.root / "requirements.lock").write_text("# nothing\n")
    (project.root / "backend.py").write_text(BACKEND)
    (project.root / "sprint" / "__init__.py").touch()
    (project.root / "sprint" / "cli.py").write_text(CLI)
    for name, body in FAKES.items():
        fake = project.fakes / name
        fake.write_text(f"#!/bin/bash\n{body}\n")
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    reset(project)
    return project


def reset(project: Project) -> None:
    project.says("uid", "0")
    project.says("installed", "iproute2", "python3-bpfcc")
    project.says("refused")
    project.says("apt.log")
    (project.root / ".cache" / "apt-refused").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def set_up_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(tmp_path_factory.mktemp("run"))
    first = project.run("demo", "--once")
    assert first.returncode == 0, first.stderr
    assert "virtual environment" in first.stderr
    assert first.stdout.split()[1:] == ["demo", "--once"], "set-up must not speak on standard output"
    return project


@pytest.fixture
def project(set_up_project: Project) -> Project:
    """A project whose set-up is done; root, and no package is missing."""
    reset(set_up_project)
    return set_up_project


def test_an_unknown_command_ends_with_2_and_the_usage_on_standard_error(project: Project) -> None:
    result = project.run("dmeo")
    assert (result.returncode, result.stdout) == (2, "")
    assert "unknown command: dmeo" in result.stderr
    assert "usage: ./run" in result.stderr


def test_no_command_ends_with_2_and_the_usage(project: Project) -> None:
    result = project.run()
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage: ./run" in result.stderr


def test_help_goes_to_standard_output_and_names_every_command(project: Project) -> None:
    result = project.run("--help")
    assert result.returncode == 0
    for command in ("demo", "sprint", "bench", "test", "lint", "lock"):
        assert f"\n  {command} " in result.stdout


def test_a_second_run_does_no_set_up_and_says_nothing(project: Project) -> None:
    result = project.run("sprint", "run", "--once")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split()[1:] == ["run", "--once"]
    assert project.apt_calls == []


def test_set_up_leaves_the_home_folder_alone(project: Project) -> None:
    assert list(project.home.iterdir()) == []


def test_demo_and_bench_are_commands_of_sprint(project: Project) -> None:
    assert project.run("bench", "wire", "--json").stdout.split()[1:] == ["bench", "wire", "--json"]
    assert project.run("demo", "--json").stdout.split()[1:] == ["demo", "--json"]


def test_arguments_arrive_as_they_were_quoted(project: Project) -> None:
    assert project.run("sprint", "keys", "a  b", "*").stdout.partition(" ")[2] == "keys a  b *\n"


def test_the_command_takes_the_scripts_place_so_that_signals_arrive(project: Project) -> None:
    process = subprocess.Popen(
        project.command("sprint", "wait"),
        env=project.env(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert int(process.stdout.readline().split()[0]) == process.pid
        process.terminate()
        assert process.wait(timeout=30) == -signal.SIGTERM
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_working_directory_of_sprint_is_the_callers(project: Project) -> None:
    cli = project.root / "sprint" / "cli.py"
    cli.write_text("import os\ndef main():\n    print(0, os.getcwd())\n")
    try:
        assert project.run("sprint", "run").stdout.split()[1] == str(project.fakes)
    finally:
        cli.write_text(CLI)


def test_without_root_one_line_says_what_stays_off(project: Project) -> None:
    project.says("uid", "1000")
    result = project.run("demo")
    assert result.returncode == 0
    assert result.stderr == "run: not root; stays off: kernel bypass\n"


def test_without_root_nothing_is_asked_of_apt_and_the_line_names_what_is_missing(project: Project) -> None:
    project.says("uid", "1000")
    project.says("installed", "iproute2")
    result = project.run("demo")
    assert (result.returncode, project.apt_calls) == (0, [])
    assert len(result.stderr.splitlines()) == 1
    assert "python3-bpfcc" in result.stderr
    assert "kernel bypass" in result.stderr


def test_without_root_a_command_that_needs_nothing_of_the_kernel_is_silent(project: Project) -> None:
    project.says("uid", "1000")
    assert project.run("sprint", "watch").stderr == ""


def test_root_installs_what_is_missing_without_being_asked_and_once(project: Project) -> None:
    project.says("installed", "iproute2")
    assert project.run("demo").returncode == 0
    (install,) = [call for call in project.apt_calls if " install " in call]
    assert install.startswith("noninteractive ")
    assert install.endswith(" install python3-bpfcc")
    assert "--no-install-recommends" in install
    calls = len(project.apt_calls)
    assert project.run("demo").stderr == ""
    assert len(project.apt_calls) == calls


def test_a_refused_package_keeps_no_other_away_and_is_not_asked_for_at_each_run(project: Project) -> None:
    project.says("installed")
    project.says("refused", "python3-bpfcc")
    first = project.run("demo", "--json")
    assert first.returncode == 0
    assert first.stdout.split()[1:] == ["demo", "--json"]
    assert "run: not installable: python3-bpfcc; stays off: kernel bypass" in first.stderr.splitlines()
    assert "iproute2" in (project.fakes / "installed").read_text().split()
    calls = len(project.apt_calls)
    second = project.run("demo")
    assert len(second.stderr.splitlines()) == 1
    assert "stays off: kernel bypass" in second.stderr
    assert len(project.apt_calls) == calls


def test_changed_project_metadata_is_installed_again_in_place(project: Project) -> None:
    canary = project.root / ".venv" / "canary"
    canary.touch()
    with (project.root / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    assert "installing" in project.run("sprint", "watch").stderr
    assert canary.exists()
    assert project.run("sprint", "watch").stderr == ""


def test_packages_that_cannot_be_installed_stop_the_run_and_the_next_starts_afresh(project: Project) -> None:
    lock = project.root / "requirements.lock"
    lock.write_text("no-such-package==1 --hash=sha256:" + 64 * "0" + "\n")
    failed = project.run("demo")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "no-such-package" in failed.stderr
    lock.write_text("# nothing\n")
    recovered = project.run("demo")
    assert recovered.returncode == 0
    # what an installation leaves that broke off is not built upon
    assert "making the virtual environment" in recovered.stderr
    assert project.run("demo").stderr == ""


@pytest.mark.parametrize("damage", ["no python", "a package gone", "moved"])
def test_an_environment_that_cannot_be_trusted_is_mended(project: Project, damage: str) -> None:
    venv = project.root / ".venv"
    match damage:
        case "no python":
            (venv / "bin" / "python").unlink()
            (venv / "bin" / "python").symlink_to("/nowhere/python3")
        case "a package gone":
            (gone,) = venv.glob("lib/python3*/site-packages/stand_in-1.dist-info")
            shutil.rmtree(gone)
        case "moved":
            pip = venv / "bin" / "pip"
            pip.write_text(pip.read_text().replace(str(venv), "/elsewhere/.venv"))
            (venv / ".set-up").unlink()
    mended = project.run("sprint", "watch")
    assert mended.returncode == 0, mended.stderr
    assert mended.stdout.split()[1:] == ["watch"]
    assert ("making the virtual environment" in mended.stderr) == (damage != "a package gone")
    assert project.run("sprint", "watch").stderr == ""


def test_of_two_first_runs_at_once_one_sets_up_and_both_work(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    both = [
        subprocess.Popen(
            project.command("sprint", "watch"),
            env=project.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("making the virtual environment" in stderr for _, stderr in outputs) == 1
    assert all(stdout.split()[1:] == ["watch"] for stdout, _ in outputs)

"""vagrant/: what Vagrant itself says of the Vagrantfile, and what provision.sh does with a checkout.

No machine is started and no box is fetched. VirtualBox is a fake that tells its version, all that Vagrant asks of it
before it checks its settings; libvirt's settings are checked by a plugin that isn't needed here, and so are left out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VAGRANTFILE = ROOT / "vagrant" / "Vagrantfile"
PROVISION = ROOT / "vagrant" / "provision.sh"

needs_vagrant = pytest.mark.skipif(shutil.which("vagrant") is None, reason="needs vagrant: apt-get install vagrant")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: provision.sh refuses to run the root tests")


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def vagrant(tmp_path: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `vagrant` on the Vagrantfile in `folder`, with everything that it writes in `tmp_path`."""
    executable(tmp_path / "bin" / "VBoxManage", "#!/bin/sh\necho 7.0.20r163906\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith("VAGRANT_")} | {
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "VAGRANT_CWD": str(folder),
        "VAGRANT_HOME": str(tmp_path / "home"),
        "VAGRANT_DOTFILE_PATH": str(tmp_path / "state"),
        "VAGRANT_DEFAULT_PROVIDER": "virtualbox",
        "VAGRANT_CHECKPOINT_DISABLE": "1",
    }
    command = ["vagrant", *arguments]
    return subprocess.run(command, env=env, text=True, capture_output=True, timeout=60, check=False)


@needs_vagrant
@pytest.mark.parametrize("options", [["--ignore-provider"], []], ids=["any provider", "virtualbox"])
def test_vagrant_validates_the_vagrantfile(tmp_path: Path, options: list[str]) -> None:
    done = vagrant(tmp_path, VAGRANTFILE.parent, "validate", *options)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_vagrant
@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("virtualbox.cpus", "virtualbox.processors", "processors"),
        ('path: "provision.sh"', 'path: "elsewhere.sh"', "elsewhere.sh"),
    ],
    ids=["unknown setting", "script that is not there"],
)
def test_a_mistake_in_the_vagrantfile_does_not_validate(tmp_path: Path, right: str, wrong: str, named: str) -> None:
    folder = tmp_path / "checkout" / "vagrant"
    folder.mkdir(parents=True)
    text = VAGRANTFILE.read_text(encoding="utf-8")
    assert right in text
    (folder / "Vagrantfile").write_text(text.replace(right, wrong), encoding="utf-8")
    shutil.copy(PROVISION, folder)
    done = vagrant(tmp_path, folder, "validate")
    assert done.returncode != 0
    assert named in done.stdout + done.stderr


@needs_vagrant
def test_the_machines_are_debian_12_and_ubuntu_24_04(tmp_path: Path) -> None:
    done = vagrant(tmp_path, VAGRANTFILE.parent, "status", "--machine-readable")
    states = [line.split(",")[1] for line in done.stdout.splitlines() if ",state,not_created" in line]
    assert states == ["debian12", "ubuntu2404"]


def test_nothing_that_git_ignores_is_copied_into_a_machine() -> None:
    words = re.search(r"NOT_COPIED = %w\[(.*?)\]", VAGRANTFILE.read_text(encoding="utf-8"), re.DOTALL)
    assert words is not None
    ignored = set((ROOT / ".gitignore").read_text(encoding="utf-8").split())
    # Compiled files lie in __pycache__; the package's metadata is small and of no machine.
    assert ignored - {"*.pyc", "*.egg-info/"} <= set(words.group(1).split())


def test_provision_is_sound_by_bash_and_shellcheck() -> None:
    subprocess.run(["bash", "-n", str(PROVISION)], check=True, timeout=60)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("needs shellcheck beside this Python: run by ./run test")
    done = subprocess.run([shellcheck, PROVISION], text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def provision(
    checkout: Path, step: str, *, run: str = 'echo "run $*"', refused: str = ""
) -> subprocess.CompletedProcess[str]:
    """provision.sh on a checkout whose `run` is the script given, and in which apt refused some packages or none."""
    executable(checkout / "run", f"#!/bin/bash\n{run}\n")
    if refused:
        (checkout / ".cache").mkdir()
        (checkout / ".cache" / "apt-refused").write_text(f" {refused}\n")
    command = [str(PROVISION), str(checkout), step]
    return subprocess.run(command, text=True, capture_output=True, timeout=60, check=False)


def test_the_set_up_is_that_of_run_and_runs_no_test(tmp_path: Path) -> None:
    done = provision(tmp_path, "set-up")
    assert (done.returncode, done.stdout) == (0, "run test --collect-only -q tests/net\n")


def test_a_set_up_that_fails_ends_the_provisioning(tmp_path: Path) -> None:
    assert provision(tmp_path, "set-up", run="exit 3").returncode == 3


def test_a_set_up_without_a_package_that_tests_need_is_a_failure_that_names_it(tmp_path: Path) -> None:
    done = provision(tmp_path, "set-up", refused="python3-bpfcc")
    assert done.returncode == 1
    assert "python3-bpfcc" in done.stderr


@needs_root
@pytest.mark.parametrize("status", [0, 1])
def test_the_root_tests_are_run_by_run_and_their_outcome_is_the_provisioning_s(tmp_path: Path, status: int) -> None:
    done = provision(tmp_path, "root-tests", run=f'echo "run $*"; exit {status}')
    assert done.returncode == status
    assert done.stdout.splitlines()[-1] == "run test tests/net"


def test_an_unknown_step_or_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    assert "expected set-up or root-tests" in provision(tmp_path / "checkout", "test").stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [str(PROVISION), str(empty), "set-up"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "no checkout" in done.stderr

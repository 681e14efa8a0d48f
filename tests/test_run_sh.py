"""run.sh: which .venv it keeps, and that it can install into one without pip, as uv makes them."""

import shutil
import subprocess
import venv

import pytest
from conftest import ROOT

INSTALL = "source <(sed '/^case \"/,$d' run.sh); install"  # all but the choice of a command


@pytest.fixture
def project(tmp_path):
    """A folder with run.sh, nothing to install, and a .venv without pip, in which a file lies."""
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("")
    venv.create(tmp_path / ".venv", symlinks=True)
    (tmp_path / ".venv/mine.txt").write_text("")
    return tmp_path


def install(project):
    return subprocess.run(
        ["bash", "-c", INSTALL, project / "run.sh"], cwd=project, capture_output=True, text=True
    )


def test_a_venv_without_pip_stays(project):
    (project / ".venv/installed.txt").write_text("")
    done = install(project)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (project / ".venv/mine.txt").exists()


@pytest.mark.slow
def test_pip_is_put_into_a_venv_without_it(project):
    done = install(project)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("installing requirements.txt")
    assert (project / ".venv/mine.txt").exists()
    assert (project / ".venv/installed.txt").exists()


def test_a_venv_of_another_folder_is_of_no_use(project):
    (project / ".venv").rename(project / "other")
    (project / ".venv").mkdir()
    shutil.copytree(project / "other/bin", project / ".venv/bin", symlinks=True)
    code = INSTALL.replace("install", "usable_venv")
    done = subprocess.run(["bash", "-c", code, project / "run.sh"], cwd=project)
    assert done.returncode == 1

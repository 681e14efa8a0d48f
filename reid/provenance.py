"""The provenance of a number: the command that made it, versions, the code's git commit.

Imports no torch: scoring starts at once.
"""

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from reid.errors import by_torchrun

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "numpy", "timm")


def provenance() -> dict:
    """Return command line, versions and the code's git commit, as a dict."""
    return {
        "command": command_line(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
        "git": git_commit(),
    }


def version(package: str) -> str | None:
    """Return a package's version, with its build where it is loaded (2.15.0+cu132), or None."""
    if package in sys.modules:
        return sys.modules[package].__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def command_line() -> str:
    """Return the command that is running, as one would type it."""
    python = ["python"]
    if by_torchrun():
        python = ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join([*python, Path(sys.argv[0]).name, *sys.argv[1:]])


def git_commit() -> dict | None:
    """Return this code's commit and whether files differ from it; None where git has neither.

    An unpacked archive may lie inside of another project's checkout.
    """

    def git(*words):
        return subprocess.run(
            # Git asks for a word of trust where another user owns the files, as in containers.
            ["git", "-c", f"safe.directory={ROOT}", "-C", ROOT, *words],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).resolve())
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no", ROOT)),
        }
    except (OSError, subprocess.CalledProcessError):
        return None

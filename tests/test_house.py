"""The rules of imports: downward only, wings for one script alone, scoring without torch."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

WINGS = {
    "reid.datasets": "prepare",
    "reid.exporting": "export",
    "reid.local_page": "page",
    "reid.rendering": "synthetic_market",
}
PARTS = ("model", "random_erasing", "re_ranking")


def modules():
    """{module's name: names of what it imports of ours} of the scripts and of reid/."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("reid/**/*.py")]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    found = {}
    for name, file in names.items():
        targets = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                targets |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = targets & names.keys()
    return found


def wing_of(name):
    return next((wing for wing in WINGS if name.startswith(wing + ".")), None)


def test_imports_run_downward():
    for name, targets in modules().items():
        if name in PARTS:
            assert not targets, name
        for target in targets if name.startswith("reid") else ():
            assert target.startswith("reid.") or target in PARTS, (name, target)


def test_a_wing_serves_one_script():
    for name, targets in modules().items():
        for wing in {wing_of(target) for target in targets} - {None, wing_of(name)}:
            assert name == WINGS[wing], (name, wing)
        if wing_of(name) == "reid.rendering":
            assert {wing_of(target) for target in targets} <= {"reid.rendering"}, name


@pytest.mark.parametrize("script", ["prepare", "changeIndex", "evaluate", "results_table"])
def test_scripts_without_a_network_import_no_torch(script):
    code = f"import sys, {script}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

"""The README stays true: its commands parse, its links lead somewhere."""

import importlib.util
import re
import shlex

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def commands():
    """The `python SCRIPT.py ...` lines of the README that run at the root."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    found = [words for words in found if words and words[0] in ("python", "torchrun")]
    # torchrun's own flags come before the script.
    starts = [next(n for n, word in enumerate(words) if word.endswith(".py")) for words in found]
    found = [words[start:] for words, start in zip(found, starts, strict=True)]
    return [words for words in found if (ROOT / words[0]).is_file()]


def test_there_are_commands_for_every_script_of_the_pipeline():
    scripts = {words[0] for words in commands()}
    pipeline = "prepare changeIndex train_baseline train_lsro test evaluate evaluate_rerank"
    assert {f"{name}.py" for name in pipeline.split()} <= scripts


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_parses(words):
    spec = importlib.util.spec_from_file_location("script", ROOT / words[0])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.get_parser().parse_args(words[1:])  # exits where a flag is unknown


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README)
    links = [one or other for one, other in links]
    assert len(links) >= 2
    for link in links:
        assert (ROOT / link).exists(), link


def test_table_of_scripts_names_flags_that_exist():
    for script, flags in re.findall(r"^\| `(\w+\.py)` \|.*\| (.*) \|$", README, re.MULTILINE):
        source = (ROOT / script).read_text() + (ROOT / "reid" / "options.py").read_text()
        source += (ROOT / "reid" / "report.py").read_text()
        for flag in re.findall(r"--\w+", flags):
            assert f'"{flag}"' in source, (script, flag)

"""README and docs stay true: commands parse, flags exist, snippets run, links lead somewhere."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from conftest import ROOT, save_image

from reid.checkpoint import Run
from reid.errors import UserError
from reid.weights import build_network

GAN = ROOT / "DCGAN-tensorflow"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [GAN / "README.md"]
# Flags of tools that are not ours: torchrun's, pytest's, run.sh's.
OTHERS = "--nproc_per_node --nnodes --rdzv_backend --rdzv_endpoint --quick".split()


def texts():
    return {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}


def commands():
    """(page, folder, words) of each line `python SCRIPT.py ...` or `torchrun ... SCRIPT.py ...`."""
    found = []
    for page, text in texts().items():
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            folder = ROOT
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["cd"]:
                    folder = GAN if words[1].startswith("DCGAN") else ROOT
                elif words and words[0] in ("python", "torchrun"):
                    script = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
                    if script is not None:  # torchrun's own flags come before the script
                        found.append((page, folder, words[script:]))
    return found


@cache
def parser(script):
    """The parser of a script of the root or of benchmarks/."""
    spec = importlib.util.spec_from_file_location(script.replace("/", "_"), ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))  # some of them import another
    spec.loader.exec_module(module)
    return module.get_parser()


@cache
def flags(script):
    return {flag for action in parser(script)._actions for flag in action.option_strings}


@cache
def gan_flags():
    """{script: its flags} of DCGAN-tensorflow, whose modules have names of the root's."""
    code = """if True:
        import json, main, resizeImage
        scripts = {"main.py": main, "resizeImage.py": resizeImage}
        print(json.dumps({name: [flag for action in module.get_parser()._actions
                                 for flag in action.option_strings]
                          for name, module in scripts.items()}))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=GAN, capture_output=True, check=True)
    return {name: set(found) for name, found in json.loads(done.stdout).items()}


def test_there_are_commands_for_every_script():
    readme = {(folder, words[0]) for page, folder, words in commands() if page == "README.md"}
    pipeline = "prepare changeIndex train_baseline train_lsro test evaluate evaluate_rerank"
    assert {(ROOT, f"{name}.py") for name in pipeline.split()} <= readme
    assert {(GAN, "main.py"), (GAN, "resizeImage.py")} <= readme
    everywhere = {words[0] for _, folder, words in commands() if folder == ROOT}
    everywhere |= set(re.findall(r"python (evaluate_gan\.py)", texts()["docs/gan.md"]))
    assert {path.name for path in ROOT.glob("*.py")} - everywhere == {
        "model.py", "random_erasing.py", "re_ranking.py",
    }  # fmt: skip


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command[2])[:60])
def test_command_parses(command):
    _, folder, words = command
    if folder == GAN:
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= gan_flags()[words[0]]
    else:
        parser(words[0]).parse_args(words[1:])  # raises UserError where a flag is unknown


def test_a_wrong_flag_would_be_seen():
    with pytest.raises(UserError, match="--colour"):
        parser("search.py").parse_args(["--query", "a.jpg", "--colour", "red"])


def test_flags_in_the_text_exist():
    """All are somebody's; those after a script's name are that script's."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]
    paths = [path for path in paths if "\ndef get_parser" in path.read_text()]
    scripts = [path.relative_to(ROOT).as_posix() for path in paths]
    known = set().union(*map(flags, scripts), *gan_flags().values(), OTHERS)
    for page, text in texts().items():
        for flag in re.findall(r"(?<![\w-])--[a-z]\w*", text):
            assert flag in known, (page, flag)
    inline = re.findall(r"`(?:python )?([\w/]+\.py) ([^`]*)`", "".join(texts().values()))
    assert len(inline) > 5
    for script, rest in inline:
        if script in scripts:
            assert set(re.findall(r"--\w+", rest)) <= flags(script), (script, rest)


def test_links_lead_somewhere():
    for page, text in texts().items():
        folder = (ROOT / page).parent
        links = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text)
        links = [one or other for one, other in links]
        for link in (link for link in links if not link.startswith("https://")):
            path, _, title = link.partition("#")
            target = folder / path if path else ROOT / page
            assert target.exists(), (page, link)
            if title:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
                assert title in anchors, (page, link)


def test_papers_have_their_titles():
    """Each that code or manual names by author and year."""
    listed = re.findall(r"^\| ([^|]+ \d{4}) \|", texts()["docs/references.md"], re.MULTILINE)
    code = [
        path for part in (".", "reid", "DCGAN-tensorflow") for path in (ROOT / part).glob("*.py")
    ]
    text = " ".join([*texts().values(), *(path.read_text() for path in code)])
    named = re.findall(r"\b([A-Z]\w+) et\s+al\.,? (\d{4})", text.replace("# ", ""))
    named = {f"{author} et al. {year}" for author, year in named}
    assert len(named) > 25
    plain = {name.translate(str.maketrans("äć", "ac")) for name in listed}
    assert {name.translate(str.maketrans("äć", "ac")) for name in named} <= plain
    assert listed == sorted(listed, key=str.lower)


def test_the_readme_is_short():
    assert len(texts()["README.md"].splitlines()) <= 200


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with what the snippets use: a run like the demo's, exported, and a query."""
    pytest.importorskip("onnxruntime")
    from reid.checkpoint import load_trained
    from reid.exporting.network import metadata
    from reid.exporting.onnx_format import onnx_file

    folder = tmp_path_factory.mktemp("readme")
    save_image(folder / "data/demo/query/0359_c6s6_015957_00.jpg", 0, (50, 120))
    run = Run(folder / "model/demo_baseline")
    run.start({"height": 64, "width": 32}, {})
    torch.manual_seed(0)
    run.save_weights(build_network("resnet18", 3, "none", (64, 32)), "last")
    trained = load_trained(run.path)
    facts = metadata(trained, run.path.name, "fp32", "inside")
    run.file("features_fp32_inside.onnx").write_bytes(onnx_file(trained, facts))
    return folder


def snippets():
    return [
        (page, code)
        for page, text in texts().items()
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page, code", snippets(), ids=[page for page, _ in snippets()])
def test_snippet_runs(page, code, runs, monkeypatch):
    monkeypatch.chdir(runs)
    names = {"crops": [np.zeros((90, 40, 3), np.uint8)]}
    exec(code, names)
    features = names["features"]
    assert features.dtype == np.float32
    assert features.shape == (1, 512)
    assert np.linalg.norm(features[0]) == pytest.approx(1, abs=1e-4)

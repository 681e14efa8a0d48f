"""The whole pipeline as a user runs it: scripts as processes, on a tiny rendered dataset."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, run_script
from PIL import Image
from scipy.io import loadmat

import synthetic_market

NETWORK = "--height 64 --width 32 --pretrained none --epochs 2 --batchsize 8".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "market").mkdir()
    scale = synthetic_market.Scale(
        train_ids=6,
        train_images=48,
        test_ids=5,
        queries=14,
        gallery_images=50,
        distractors=6,
        junk=5,
    )
    synthetic_market.render(folder / "market", scale, seed=0, workers=0)
    return folder


def ok(*words, cwd):
    code, out, err = run_script(*words, cwd=cwd)
    assert code == 0, f"{words}\n{out}\n{err}"
    return out


def dcgan(script, *flags):
    done = subprocess.run(
        [sys.executable, script, *map(str, flags)],
        cwd=ROOT / "DCGAN-tensorflow",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_pipeline(data):
    market, prepared, work = data / "market", data / "market" / "pytorch", data / "work"
    work.mkdir()
    ok("prepare.py", "--download_path", market, cwd=work)
    ok("changeIndex.py", "--data_dir", prepared, cwd=work)

    gan = ["--dataset", market / "bounding_box_train", "--checkpoint_dir", data / "checkpoint"]
    gan += ["--sample_dir", data / "samples"]
    network = ["--output_height", 32, "--output_width", 16, "--gf_dim", 4, "--df_dim", 4]
    dcgan("main.py", *gan, *network, "--train", "--epoch", 1, "--batch_size", 16)
    raw, gen = data / "generated", prepared / "train_new" / "gen_0000"
    dcgan("main.py", *gan, "--options", 5, "--sample_size", 10, "--output_path", raw)
    dcgan("resizeImage.py", "--input_path", raw, "--output_path", gen)
    made = sorted(gen.glob("*.jpg"))
    assert len(made) == 10
    assert Image.open(made[0]).size == (64, 128)

    # The original's flags, in the original's order; the default places under the current folder.
    common = ["--data_dir", prepared, *NETWORK, "--gpu_ids", "-1", "--erasing_p", "0.5"]
    ok("train_baseline.py", "--name", "baseline", "--use_dense", *common, cwd=work)
    ok("train_lsro.py", "--name", "lsro", *common, "--num_generated", 7, cwd=work)
    runs = work / "model"
    opts = json.loads((runs / "lsro" / "opts.json").read_text())
    assert (opts["generated"], opts["gan_manifest"]["path"]) == (7, str(gen / "manifest.json"))

    for name, dim in [("baseline", 1024), ("lsro", 2048)]:
        flags = ["--name", name, "--test_dir", prepared, "--which_epoch", "best"]
        ok("test.py", "--gpu_ids", "-1", *flags, "--multi", cwd=work)
        content = loadmat(work / "pytorch_result.mat")
        assert content["query_f"].shape == (14, dim)
        assert content["gallery_f"].shape == (50, dim)
        assert {-1, 0} < set(content["gallery_label"][0].tolist())
        results = runs / name / "results.json"
        for script in ("evaluate.py", "evaluate_rerank.py"):
            out = ok(script, "--json", results, "--plot", "--show", 3, cwd=work)
            assert sum(line.startswith("top1:") for line in out.splitlines()) == 1
            assert "multi-query top1:" in out
        pictures = {path.name.removeprefix("pytorch_result_") for path in work.glob("*.jpg")}
        assert pictures == {"cmc.jpg", "rankings.jpg", "rerank_cmc.jpg", "rerank_rankings.jpg"}
        scores = json.loads(results.read_text())
        assert scores.keys() == {"train", "evaluate", "evaluate_rerank"}
        for section in ("evaluate", "evaluate_rerank"):
            assert 0 < scores[section]["mAP"] <= 1
            assert scores[section]["rank1"] <= scores[section]["rank5"] <= scores[section]["rank10"]

    table = ok("results_table.py", runs / "baseline", runs / "lsro", cwd=work).splitlines()
    assert len(table) == 2 + 4
    assert table[2].startswith("| baseline | DenseNet-121 | 0 | plain |")
    assert table[5].startswith("| lsro | ResNet-50 | 7 | re-ranked |")

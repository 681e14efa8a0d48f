"""A user's mistakes: one line that names the file or flag, exit code 2, nothing left behind."""

import importlib
import runpy
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, ROOT, exit_code, run_script, save_image
from scipy.io import loadmat, savemat

import changeIndex
import evaluate
import evaluate_rerank
import prepare
import results_table
import test as extraction
import train_baseline
import train_lsro
from model import ft_net, ft_net_dense
from reid.batches import check_batchsize
from reid.checkpoint import Run
from reid.dataset import Sample
from reid.device import choose_device, dtype_for
from reid.distributed import World, join_world
from reid.engine import choose_dtype, leaving_clean, warn
from reid.errors import Interrupted, UserError

CPU = ("--gpu_ids", "-1", "--workers", "0")
SMALL = (*CPU, "--pretrained", "none", "--height", "64", "--width", "32", "--use_dense")


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def fails(tmp_path, capsys):
    """Run a script's main as a process would; expect the one line and nothing new on disk."""

    def check(main, *flags, says):
        before = tree(tmp_path)
        assert exit_code(main, *flags) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        for text in says if isinstance(says, (list, tuple)) else [says]:
            assert str(text) in lines[0]
        assert tree(tmp_path) == before

    return check


SCRIPTS = "prepare changeIndex train_baseline train_lsro evaluate evaluate_rerank results_table"
SCRIPTS += " ablation cross_test evaluate_gan search page export test synthetic_market"


@pytest.mark.parametrize("script", SCRIPTS.split())
def test_a_wrong_flag_of_every_script(script, tmp_path, monkeypatch, capsys):
    """As `python SCRIPT.py` runs it, but in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--nonsense"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert tree(tmp_path) == []


def test_a_wrong_flag_as_a_process(tmp_path):
    code, out, err = run_script("evaluate.py", "--nonsense", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert tree(tmp_path) == []


@pytest.mark.parametrize("script", SCRIPTS.split())
def test_help_explains_every_flag_with_its_default(script):
    parser = importlib.import_module(script).get_parser()
    for action in parser._actions:
        assert action.help, action.dest
        if action.default is None and not action.required:  # the text itself says what happens then
            assert "default" in action.help or "also write" in action.help, action.dest
    text = " ".join(parser.format_help().split())  # undo the line breaks
    assert "(default: " in text or script == "results_table"


def test_flags_are_not_abbreviated(fails):
    fails(train_baseline.main, "--batch", 8, says="--batch")


def test_values_out_of_range(fails):
    fails(train_baseline.main, "--erasing_p", 1.5, says=["--erasing_p", "1.5"])
    fails(train_baseline.main, "--epochs", 0, says=["--epochs", "under 1"])
    fails(train_baseline.main, "--lr", "nan", says=["--lr", "nan"])
    fails(train_lsro.main, "--num_generated", -3, says=["--num_generated", "under 0"])


def test_data_folder_missing_or_empty(fails, tmp_path):
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    fails(prepare.main, "--download_path", nowhere, says=[nowhere, "--download_path"])
    fails(prepare.main, "--download_path", empty, says="bounding_box_train: no such folder")
    (empty / "bounding_box_train").mkdir()
    fails(prepare.main, "--download_path", empty, says="bounding_box_train: no images")
    for main in (changeIndex.main, train_baseline.main, train_lsro.main):
        fails(main, "--data_dir", nowhere, says=[nowhere, "--data_dir"])
    fails(changeIndex.main, "--data_dir", empty, says=["train", "make it with prepare.py"])


def test_train_new_missing(fails, prepared):
    shutil.rmtree(prepared / "train_new")
    fails(train_baseline.main, "--data_dir", prepared, says="make it with changeIndex.py")


def test_images_that_a_dataset_has_none_of(fails, prepared, tmp_path):
    """Which prepare.py can't make, either."""
    flags = ("--data_dir", prepared, "--mat", tmp_path / "x.mat")
    shutil.rmtree(prepared / "multi-query")
    fails(extraction.main, *flags, "--multi", says=["--multi: ", "has no multi-query"])
    shutil.rmtree(prepared / "train")
    fails(extraction.main, *flags, "--val", says="train: no such folder; make it with prepare.py")
    shutil.rmtree(prepared / "train_all")
    shutil.copytree(prepared / "val", prepared / "train_all")
    fails(extraction.main, *flags, "--val", says=["--val: ", "one image of each", "leave it out"])


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_prepare_stops_at_an_unreadable_image(fails, market, damage):
    path = sorted((market / "query").iterdir())[1]
    content = {"truncated": path.read_bytes()[:900], "text": b"no image", "empty": b""}
    path.write_bytes(content[damage])
    fails(prepare.main, "--download_path", market, says=[path, "can't be read as an image"])


def test_a_name_that_does_not_parse(fails, market):
    path = save_image(market / "bounding_box_train" / "holiday.jpg")
    fails(prepare.main, "--download_path", market, says=[path, "0002_c1s1_000451_03.jpg"])


def test_prepare_will_not_mix_with_other_files(fails, prepared, market):
    (prepared / "query" / "0001" / "0001_c2s1_000002_00.jpg").unlink()
    fails(prepare.main, "--download_path", market, says=[prepared, "--save_path"])


def test_output_folders_that_cannot_be_written(fails, market, prepared, tmp_path):
    file = tmp_path / "file"
    file.touch()
    fails(
        prepare.main, "--download_path", market, "--save_path", file / "x", says="can't be written"
    )
    fails(
        train_baseline.main,
        *("--data_dir", prepared, "--model_dir", file, *SMALL),
        says=[file, "can't be written"],
    )
    fails(
        evaluate.main,
        FIXTURES / "retrieval.mat",
        *("--json", file / "results.json"),
        says="results.json",
    )


def test_change_index_into_a_folder_that_cannot_be_written(fails, prepared, monkeypatch):
    shutil.rmtree(prepared / "val_new")

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refused)
    fails(changeIndex.main, "--data_dir", prepared, says=["val_new", "Permission denied"])


def test_two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device, ids = choose_device("0,1")
    assert (str(device), ids) == ("cuda:0", [0, 1])
    assert choose_device("1") == (torch.device("cuda", 1), [])
    # DataParallel's threads would compute in fp16, unscaled.
    assert dtype_for(device, "auto", ids) is None
    with pytest.raises(UserError, match="--precision bf16"):
        dtype_for(device, "bf16", ids)


def test_data_parallel_warns_what_it_costs(capsys):
    args = train_baseline.get_parser().parse_args([])
    two = World(0, 1, torch.device("cuda", 0), [0, 1])
    images = [Sample(Path("a.jpg"), 0)] * 100
    check_batchsize(args, two, images)
    warn(args, two)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "batch norm sees 1/2 of each batch" in lines[0]
    assert "torchrun --nproc_per_node 2" in lines[0]
    with pytest.raises(UserError, match="two images or more, on each GPU"):
        check_batchsize(args, two, images[:2])
    warn(args, two._replace(gpus=[]))
    assert capsys.readouterr().err == ""


def test_a_warm_up_without_an_end_is_warned_of(capsys):
    args = train_baseline.get_parser().parse_args(["--epochs", "5", "--warm_epoch", "5"])
    warn(args, World(0, 1, torch.device("cpu"), []))
    assert capsys.readouterr().err.startswith("warning: --warm_epoch 5: the learning rate still")


def test_a_run_in_bf16_goes_on_elsewhere(capsys):
    """DataParallel can't, whatever the user asked for; other hardware can, slowly."""
    args = train_baseline.get_parser().parse_args([])
    opts, card = {"arithmetic": "bfloat16"}, torch.device("cuda", 0)
    with pytest.raises(UserError, match="--gpu_ids: this run computes in bf16, which DataParallel"):
        choose_dtype(args, World(0, 1, card, [0, 1]), None, opts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reid.engine.computes_bf16", lambda device: False)
        dtype = choose_dtype(args, World(0, 1, torch.device("cpu"), []), None, opts)
    assert dtype == torch.bfloat16
    assert "bf16, which may be slow here" in capsys.readouterr().err


def test_the_trial_of_arithmetic_has_two_images_or_more(monkeypatch):
    """Also where each process gets one image of a batch: batch norm takes no single one."""
    tried = []
    monkeypatch.setattr("reid.device.computes_bf16", lambda device: True)
    monkeypatch.setattr("reid.engine.faster_dtype", lambda *some, **kinds: tried.append(some[3]))
    args = train_baseline.get_parser().parse_args(["--batchsize", "8"])
    net = Namespace(backbone="resnet50")
    for processes in (8, 2):
        choose_dtype(args, World(0, processes, torch.device("cpu"), []), net, {})
    assert tried == [2, 4]


def test_each_of_several_machines_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    says = r"go on with: the same command and --resume, on each machine"
    with (
        pytest.raises(Interrupted, match=says),
        leaving_clean(Run(tmp_path), World(0, 8, torch.device("cpu"), [])),
    ):
        raise KeyboardInterrupt


def test_gpus_are_torchruns_to_give(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--gpu_ids 0,1: torchrun gives each process its GPU"):
        join_world("0,1")


def test_number_of_generated_images_too_large(fails, prepared, tmp_path):
    gen_dir = save_image(tmp_path / "gen" / "gen_00000.jpg").parent
    flags = ("--data_dir", prepared, "--gen_dir", gen_dir, "--num_generated", 2)
    fails(train_lsro.main, *flags, says=["--num_generated 2", "only 1 images", gen_dir])
    flags = ("--data_dir", prepared)
    fails(train_lsro.main, *flags, says="gen_0000: no such folder")


def test_weights_that_are_not_there(fails, prepared, tmp_path):
    flags = ("--data_dir", prepared, "--model_dir", tmp_path, *SMALL[:-5], "--pretrained")
    fails(train_baseline.main, *flags, tmp_path / "no.pth", says=["--pretrained", "no.pth"])


def test_gpu_that_is_not_there(fails, prepared, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for ids in ("0", "0,1"):
        fails(
            train_baseline.main, "--data_dir", prepared, "--gpu_ids", ids, says=["--gpu_ids", ids]
        )
    fails(train_baseline.main, "--data_dir", prepared, "--gpu_ids", "first", says="--gpu_ids first")


def test_extraction(fails, prepared, tmp_path, monkeypatch):
    """test.py: a missing run, a missing epoch, another network, a file that can't be written."""
    monkeypatch.chdir(tmp_path)
    for name, network in ("dense", ft_net_dense), ("resnet", ft_net):
        Run(tmp_path / name).path.mkdir()
        Run(tmp_path / name).save_weights(network(3), "last")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "net_last.pth").write_bytes(b"damaged")
    (tmp_path / "file").touch()
    flags = ("--test_dir", prepared, "--model_dir", tmp_path, *CPU, "--name")
    for more, says in [
        (("none",), "none: no such run"),
        (("dense", "--which_epoch", "59"), "--which_epoch can be last"),
        (("damaged",), "net_last.pth: not a readable"),
        (("resnet", "--use_dense"), "holds a ResNet-50, not the expected DenseNet-121"),
        (("dense", "--data_dir", tmp_path / "nowhere"), "nowhere: no such folder"),
        (("dense", "--mat", tmp_path / "file" / "r.mat"), "can't be written"),
    ]:
        fails(extraction.main, *flags, *more, says=says)
    image = next((prepared / "query").glob("*/*.jpg"))
    image.write_bytes(image.read_bytes()[:500])
    # Though a loader's process meets it.
    fails(extraction.main, *flags, "dense", "--workers", 1, says=image.name)


@pytest.mark.parametrize("main", [evaluate.main, evaluate_rerank.main])
def test_scoring(fails, main, tmp_path):
    fails(main, tmp_path / "none.mat", says=["none.mat: no such file", "test.py"])
    (tmp_path / "text.mat").write_text("no MATLAB")
    fails(main, tmp_path / "text.mat", says="text.mat: can't be read")
    content = loadmat(FIXTURES / "retrieval.mat")
    del content["gallery_cam"]
    savemat(tmp_path / "lacks.mat", {k: v for k, v in content.items() if k[0] != "_"})
    fails(main, tmp_path / "lacks.mat", says="lacks.mat: has no gallery_cam")
    fails(main, FIXTURES / "retrieval.mat", "--json", tmp_path, says="is a folder; name a file")


def test_results_table_without_scores(fails, tmp_path):
    fails(results_table.main, tmp_path, says="opts.json: no such file")


def test_the_folder_above_the_prepared_one(fails, market, prepared):
    fails(train_baseline.main, "--data_dir", market, says=[market, "name", prepared])


def test_no_generated_images(fails, prepared):
    fails(train_lsro.main, "--data_dir", prepared, says=["gen_0000: no such folder", "--gen_dir"])

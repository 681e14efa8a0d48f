"""File names, splits, class numbers, generated images."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import call, exit_code, save_image

import changeIndex
import prepare
from reid.dataset import (
    CAMERA_AFTER_C,
    CAMERA_THIRD,
    GENERATED_LABEL,
    EvalImage,
    check_cameras,
    check_copies,
    count_classes,
    eval_images,
    fingerprint,
    generated_images,
    identity_folders,
    labelled_images,
    list_images,
    parse_name,
    training_splits,
)
from reid.errors import UserError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0002_c1s1_000451_03.jpg", (2, 1)),
        ("-1_c3s2_000451_03.jpg", (-1, 3)),
        ("0000_c6s4_000451_03.jpg", (0, 6)),
        ("123456_c12s1_000451_03.jpg", (123456, 12)),
        ("0001_c2_f0046182.jpg", (1, 2)),
        ("0001_c1_1.png", (1, 1)),
        ("0000_000_01_0303morning_0015_0.jpg", (0, 1)),
        ("0042_013_15_0303afternoon_0015_0.jpg", (42, 15)),
        ("0001_c001_00016450_0.jpg", (1, 1)),
        ("v0776_c020_00016450_0.jpg", (776, 20)),
        ("/data_c9/query/0002_c1s1_000451_03.jpg", (2, 1)),
        ("C:\\data_c9\\0002\\0002_c1s1_000451_03.JPEG", (2, 1)),
    ],
)
def test_parse_name(name, expected):
    assert parse_name(name) == expected


# The last two: id, camera, frame, box, which is nobody's pattern; a number that no format keeps.
@pytest.mark.parametrize(
    "name",
    [
        "photo.jpg",
        "c1_0002.jpg",
        "0002.jpg",
        "x0002_c1s1_1_1.jpg",
        "0007_01_000213_00.jpg",
        f"{2**63}_c1s1_1_1.jpg",
    ],
)
def test_parse_name_refuses(name):
    with pytest.raises(UserError, match=name):
        parse_name(f"folder/{name}")


def test_no_name_is_read_by_two_patterns():
    for name in ("0002_c1s1_000451_03.jpg", "0000_000_01_0303morning_0015_0.jpg"):
        read = [pattern for pattern in (CAMERA_AFTER_C, CAMERA_THIRD) if pattern.match(name)]
        assert len(read) == 1


def seen(number, identity, camera):
    return EvalImage(Path(f"query/{number}.jpg"), identity, camera)


def test_more_cameras_than_credible():
    """Frames that are read as cameras; but a few images of eight cameras are credible."""
    check_cameras("data", [seen(n, n, n) for n in range(8)])
    check_cameras("data", [seen(n, n, n % 50) for n in range(100)])
    with pytest.raises(UserError, match=r"51 cameras in 100 images.*\(0.jpg: id 0, camera 0; 1"):
        check_cameras("data", [seen(n, n, n % 51) for n in range(100)])


def test_a_picture_that_is_query_and_gallery(tmp_path):
    """Copies of the query's identity and camera, and junk, count nothing; others are refused."""
    a, b, c = (save_image(tmp_path / f"{n}.png", seed=n > 0) for n in range(3))
    queries = [EvalImage(a, 1, 1), EvalImage(b, 2, 1)]
    check_copies(queries, [EvalImage(c, 2, 1)])
    check_copies(queries, [EvalImage(c, -1, 3)])
    for identity, camera in ((2, 2), (3, 1), (0, 1)):
        with pytest.raises(UserError, match=r"1\.png \(id 2, camera 1\) and .*2\.png"):
            check_copies(queries, [EvalImage(c, identity, camera)])


@pytest.mark.parametrize("split", ["train_all", "train_new"])
def test_one_identity_in_two_folders(prepared, split):
    """In training they would be two people, in testing one."""
    folder = next(f for f in sorted((prepared / split).iterdir()) if int(f.name))
    folder.with_name(str(int(folder.name))).mkdir()
    with pytest.raises(UserError, match=rf"{split}: identities .* and .* are one number"):
        identity_folders(prepared / split)


def test_junk_is_no_class(prepared):
    shutil.copytree(prepared / "train_new" / "0000", prepared / "train_new" / "-1")
    with pytest.raises(UserError, match="train_new/-1: -1 is no class"):
        count_classes(labelled_images(prepared / "train_new"))
    shutil.copytree(prepared / "train_all" / "0002", prepared / "train_all" / "-1")
    with pytest.raises(UserError, match="train_all/-1: junk among the training images"):
        call(changeIndex.main, "--data_dir", prepared)


def test_folders_that_are_at_work_are_not_looked_at(prepared):
    """resizeImage.py fills .gen_0000.partial in train_new while changeIndex.py may run again."""
    save_image(prepared / "train_new" / ".gen_0000.partial" / "1.jpg")
    save_image(prepared / "train_new" / "__MACOSX" / "1.jpg")
    call(changeIndex.main, "--data_dir", prepared)
    assert count_classes(labelled_images(prepared / "train_new")) == 3


def test_images_generated_before_classes_are_numbered(prepared):
    shutil.rmtree(prepared / "train_new")
    save_image(prepared / "train_new" / "gen_0000" / "1.jpg")
    with pytest.raises(UserError, match="train_new/gen_0000: move it away, run this again"):
        call(changeIndex.main, "--data_dir", prepared)
    (prepared / "train_new" / "gen_0000").rename(prepared / "gen_0000")  # leaves an empty folder
    call(changeIndex.main, "--data_dir", prepared)
    assert count_classes(labelled_images(prepared / "train_new")) == 3


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.glob("*/*"))


def test_prepare_splits(prepared):
    assert len(names(prepared / "train_all")) == 12
    assert names(prepared / "val") == [
        f"{i}/{i}_c1s1_000001_01.jpg" for i in ("0002", "0007", "0010")
    ]
    train, val = set(names(prepared / "train")), set(names(prepared / "val"))
    assert not train & val
    assert train | val == set(names(prepared / "train_all"))
    assert "-1/-1_c1s1_000001_01.jpg" in names(prepared / "gallery")
    # Of gt_bbox only the queries' identities: 0002 is a training one.
    assert {name.split("/")[0] for name in names(prepared / "multi-query")} == {"0001"}


def test_prepare_again_is_a_no_op(prepared, market, capsys):
    call(prepare.main, "--download_path", market)
    assert "already there and complete" in capsys.readouterr().out


def test_prepare_without_gt_bbox(market, tmp_path):
    for path in (market / "gt_bbox").iterdir():
        path.unlink()
    (market / "gt_bbox").rmdir()
    call(prepare.main, "--download_path", market, "--save_path", tmp_path / "made")
    assert not (tmp_path / "made" / "multi-query").exists()


def test_class_index_follows_identity_order(prepared):
    assert json.loads((prepared / "class_index.json").read_text()) == {
        "0002": 0,
        "0007": 1,
        "0010": 2,
    }
    for split, size in [("train_new", 9), ("val_new", 3), ("train_all_new", 12)]:
        samples = labelled_images(prepared / split)
        assert len(samples) == size
        for sample in samples:
            assert sample.label == {2: 0, 7: 1, 10: 2}[parse_name(sample.path)[0]]
            assert sample.generated == 0


def test_class_index_is_numerical_not_alphabetical():
    assert changeIndex.class_index(["10", "9", "002"]) == {"002": 0, "9": 1, "10": 2}


def test_change_index_again_keeps_generated_images(prepared):
    picture = save_image(prepared / "train_new" / "gen_0000" / "gen_00000.jpg")
    call(changeIndex.main, "--data_dir", prepared)
    assert picture.exists()


def test_baseline_never_sees_generated_images(prepared):
    save_image(prepared / "train_new" / "gen_0000" / "gen_00000.jpg")
    train = training_splits(prepared, train_all=False).train
    assert not any("gen" in sample.path.name for sample in train)


def test_test_images(prepared):
    found = {(entry.identity, entry.camera) for entry in eval_images(prepared / "gallery")}
    assert found == {(-1, 1), (0, 2), (1, 1), (1, 2), (3, 1)}


def test_an_image_in_another_persons_folder(prepared, capsys):
    """As where a label was corrected by moving the file alone: folder and name disagree."""
    image = next((prepared / "gallery" / "0001").iterdir())
    image.rename(prepared / "gallery" / "0003" / image.name)
    with pytest.raises(UserError, match=f"{image.name}: its name says identity 1; rename it"):
        eval_images(prepared / "gallery")
    for split in changeIndex.SPLITS:
        shutil.rmtree(prepared / f"{split}_new")
    image = next((prepared / "train" / "0002").iterdir())
    image.rename(prepared / "train" / "0007" / image.name)
    assert exit_code(changeIndex.main, "--data_dir", prepared) == 2
    assert "its name says identity 2; rename it" in capsys.readouterr().err
    assert not list(prepared.glob("*_new"))
    image = prepared / "train" / "0007" / image.name
    image.rename(image.with_name(image.name.replace("0002", "0007")))  # to another one's name
    (prepared / "train" / "0007" / "crop.jpg").hardlink_to(save_image(prepared / "x.jpg", 1))
    call(changeIndex.main, "--data_dir", prepared)  # whose name of no known kind says nothing


def test_classes_are_numbered_anew_all_or_none(prepared, capsys):
    save_image(prepared / "train_new" / "gen_0000" / "gen_0.jpg")
    for split in changeIndex.SPLITS:
        shutil.rmtree(prepared / split / "0002")
    assert exit_code(changeIndex.main, "--data_dir", prepared) == 2
    says = "move .*train_new/gen_0000 out of it, delete it and run this again"
    assert re.search(says, capsys.readouterr().err)
    shutil.rmtree(prepared / "train_new")
    assert exit_code(changeIndex.main, "--data_dir", prepared) == 2
    assert "_new: holds something else; delete it and run this" in capsys.readouterr().err
    assert not (prepared / "train_new").exists()


def test_classes_of_two_numberings(prepared):
    """train_new numbers three people, val_new others: class 0 would be two people."""
    shutil.rmtree(prepared / "val_new" / "0000")
    for label in (1, 2):
        (prepared / "val_new" / f"{label:04d}").rename(prepared / "val_new" / f"{label - 1:04d}")
    with pytest.raises(UserError, match="class 0 has images of two identities"):
        training_splits(prepared, train_all=False)
    training_splits(prepared, train_all=True)


def test_preparing_again_keeps_generated_images(market, prepared):
    save_image(prepared / "train_new" / "gen_0000" / "gen_0.jpg")
    save_image(market / "bounding_box_train" / "0002_c1s1_000009_01.jpg")
    says = "holds something else.*; move .*train_new/gen_0000 out of it and delete"
    with pytest.raises(UserError, match=says):
        call(prepare.main, "--download_path", market)


def test_generated_images_are_chosen_by_the_seed(tmp_path):
    for number in range(20):
        save_image(tmp_path / f"gen_{number:05d}.png", seed=number, size=(4, 4))
    few = generated_images(tmp_path, 7, seed=1)
    assert len(set(few)) == 7
    assert all(s.generated == 1 and s.label == GENERATED_LABEL for s in few)
    assert few == generated_images(tmp_path, 7, seed=1)
    assert few != generated_images(tmp_path, 7, seed=2)
    assert len(generated_images(tmp_path)) == 20
    assert generated_images("nowhere", 0) == []
    with pytest.raises(UserError, match=r"--num_generated 21: only 20 images"):
        generated_images(tmp_path, 21)


def test_one_identity_is_too_few(prepared):
    for folder in (prepared / "train_all_new").iterdir():
        if folder.name != "0000":
            shutil.rmtree(folder)
    with pytest.raises(UserError, match="has one identity to train on"):
        training_splits(prepared, train_all=True)


def test_count_classes_names_a_gap(prepared):
    samples = labelled_images(prepared / "train_new")
    assert count_classes(samples) == 3
    with pytest.raises(UserError, match="class 1 is missing"):
        count_classes([s for s in samples if s.label != 1])


def test_list_images_takes_every_suffix_in_any_case(tmp_path):
    for name in ("a.JPG", "b.jpeg", "c.PNG", "d.bmp", "notes.txt", "._a.jpg"):
        (tmp_path / name).touch()
    assert [p.name for p in list_images(tmp_path)] == ["a.JPG", "b.jpeg", "c.PNG", "d.bmp"]


def test_fingerprint_sees_a_changed_file(prepared):
    samples = labelled_images(prepared / "train_new")
    before = fingerprint(samples)
    assert before == fingerprint(samples[::-1])
    Path(samples[0].path).write_bytes(b"changed")
    assert fingerprint(samples) != before

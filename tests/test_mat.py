"""`.mat` files: ours, the original's, damaged ones."""

import re
import shutil

import numpy as np
import pytest
from conftest import FIXTURES, random_sets
from scipy.io import loadmat, savemat

from reid.dataset import EvalImage
from reid.errors import UserError
from reid.mat import EvalSets, check_storable, load_mat, load_multi, save_mat, unit_length
from reid.metrics import FeatureSet


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_written_as_the_field_reads_it(tmp_path):
    written = random_sets()
    save_mat(tmp_path / "r.mat", written)
    content = loadmat(tmp_path / "r.mat")
    for name, rows in [("query", 12), ("gallery", 60), ("mquery", 30)]:
        assert content[f"{name}_f"].shape == (rows, 4)
        assert content[f"{name}_f"].dtype == np.float32
        assert content[f"{name}_label"].shape == content[f"{name}_cam"].shape == (1, rows)
    assert content["query_label"][0].tolist() == written.query.identities.tolist()
    found = load_mat(tmp_path / "r.mat")
    assert all(same(a, b) for a, b in zip(found[:3], written[:3], strict=True))
    assert found.data_dir == written.data_dir


def test_a_file_of_the_original():
    query, gallery, multi, data_dir, source = load_mat(FIXTURES / "retrieval.mat")
    assert query.features.shape == (98, 48)
    assert gallery.identities.shape == gallery.cameras.shape == (670,)
    assert gallery.identities.min() == -1  # signed, whatever MATLAB made of it
    assert query.files is gallery.files is multi is data_dir is source is None


@pytest.mark.parametrize(
    "source",
    [None, {"run": "model/ü", "scales": [1.0, 0.9]}, {"weights_sha256": "a", "split": "query"}],
)
def test_what_made_the_features(source, tmp_path):
    save_mat(tmp_path / "r.mat", random_sets()._replace(source=source))
    assert load_mat(tmp_path / "r.mat").source == source


@pytest.mark.parametrize("source", ["Market", "[1, 2]", '{"a": 1}', 7, np.zeros((2, 2))])
def test_another_code_means_something_else_by_source(source, tmp_path):
    content = loadmat(FIXTURES / "retrieval.mat")
    content = {name: value for name, value in content.items() if name[0] != "_"}
    savemat(tmp_path / "r.mat", content | {"source": source})
    assert load_mat(tmp_path / "r.mat").source is None


def test_a_single_query_stays_a_row(tmp_path):
    sets = random_sets()
    save_mat(
        tmp_path / "r.mat", sets._replace(query=FeatureSet(*(field[:1] for field in sets.query)))
    )
    assert load_mat(tmp_path / "r.mat").query.features.shape == (1, 4)


def test_multi_query_images_of_another_code(tmp_path):
    sets = random_sets()
    save_mat(tmp_path / "r.mat", sets)
    content = loadmat(tmp_path / "r.mat")
    keys = ("mquery_f", "mquery_label", "mquery_cam")
    savemat(tmp_path / "multi_query.mat", {key: content[key] for key in keys})
    multi = load_multi(tmp_path / "multi_query.mat", sets.gallery)
    assert same(multi[:3], sets.multi[:3])
    with pytest.raises(UserError, match="mquery_f has 4 columns, gallery_f 5"):
        load_multi(tmp_path / "multi_query.mat", random_sets(dim=5).gallery)
    save_mat(tmp_path / "none.mat", sets._replace(multi=None))
    with pytest.raises(UserError, match=r"none\.mat: has no mquery_f"):
        load_multi(tmp_path / "none.mat", sets.gallery)


@pytest.mark.parametrize("key", ["query_f", "gallery_label", "query_cam"])
def test_a_missing_key_is_named(key, tmp_path):
    save_mat(tmp_path / "r.mat", random_sets())
    content = {k: v for k, v in loadmat(tmp_path / "r.mat").items() if k != key}
    savemat(tmp_path / "r.mat", {k: v for k, v in content.items() if not k.startswith("__")})
    with pytest.raises(UserError, match=rf"r\.mat: has no {key}"):
        load_mat(tmp_path / "r.mat")


def test_labels_must_match_rows(tmp_path):
    wrong = random_sets()
    gallery = wrong.gallery._replace(identities=np.arange(7))
    save_mat(tmp_path / "r.mat", wrong._replace(gallery=gallery))
    with pytest.raises(UserError, match="gallery_f is 60 x 4, but there are 7 labels"):
        load_mat(tmp_path / "r.mat")
    gallery = wrong.gallery._replace(files=wrong.gallery.files[:7])
    save_mat(tmp_path / "r.mat", wrong._replace(gallery=gallery))
    with pytest.raises(UserError, match="60 rows in gallery_f, but 7 gallery_files"):
        load_mat(tmp_path / "r.mat")


def test_features_must_have_one_length(tmp_path):
    wrong = random_sets()._replace(query=random_sets(dim=5).query)
    save_mat(tmp_path / "r.mat", wrong)
    with pytest.raises(UserError, match="query_f has 5 columns, gallery_f 4"):
        load_mat(tmp_path / "r.mat")


@pytest.mark.parametrize("wrong", ["text", np.array([["a"]]), np.ones((2, 3, 4)), np.ones((0, 4))])
def test_features_must_be_rows_of_numbers(wrong, tmp_path):
    save_mat(tmp_path / "r.mat", random_sets())
    content = loadmat(tmp_path / "r.mat") | {"query_f": wrong}
    savemat(tmp_path / "r.mat", {k: v for k, v in content.items() if not k.startswith("__")})
    with pytest.raises(UserError, match=r"r\.mat: query_f is "):
        load_mat(tmp_path / "r.mat")


@pytest.mark.parametrize("value", [np.nan, 1.5, np.inf])
def test_labels_are_whole_numbers(value, tmp_path):
    sets = random_sets()
    cameras = sets.query.cameras.astype(float)
    cameras[3] = value
    save_mat(tmp_path / "r.mat", sets._replace(query=sets.query._replace(cameras=cameras)))
    with pytest.raises(UserError, match=r"r\.mat: query_cam has values that are not whole numbers"):
        load_mat(tmp_path / "r.mat")


def with_labels(path, query, gallery):
    """Write a file whose labels are these arrays."""
    sets = random_sets()
    save_mat(path, sets)
    content = {k: v for k, v in loadmat(path).items() if not k.startswith("__")}
    savemat(path, content | {"query_label": query[None], "gallery_label": gallery[None]})
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_junk_that_was_kept_as_an_unsigned_number(dtype, tmp_path, capsys):
    sets = random_sets()
    assert (sets.gallery.identities == -1).any()
    wrapped = sets.gallery.identities.astype(dtype)
    found = load_mat(with_labels(tmp_path / "r.mat", sets.query.identities, wrapped))
    np.testing.assert_array_equal(found.gallery.identities, sets.gallery.identities)
    assert "is read as -1, junk" in capsys.readouterr().err


def test_the_largest_number_of_a_type_may_be_a_person(tmp_path):
    """It is where a query has it; where other numbers come near it, nobody can tell."""
    sets = random_sets()
    query = sets.query.identities.astype(np.uint8)
    gallery = sets.gallery.identities.clip(0).astype(np.uint8)
    query[0] = gallery[0] = 255
    found = load_mat(with_labels(tmp_path / "r.mat", query, gallery))
    assert found.gallery.identities[0] == found.query.identities[0] == 255
    query[0], gallery[1] = 1, 200
    with pytest.raises(UserError, match="gallery_label has 255: that is -1 kept as uint8, or a"):
        load_mat(with_labels(tmp_path / "r.mat", query, gallery))


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 1e300, 2.0**60])
def test_labels_that_no_other_format_holds(value, tmp_path):
    sets = random_sets()
    kind = float if isinstance(value, float) else np.int64
    query, gallery = (part.identities.astype(kind) for part in sets[:2])
    query[0] = value
    with pytest.raises(UserError, match=r"query_label has values beyond 2\^53"):
        load_mat(with_labels(tmp_path / "r.mat", query, gallery))


def test_matlab_7_3(tmp_path):
    """HDF5 with MATLAB's own first bytes; its arrays lie transposed."""
    h5py = pytest.importorskip("h5py")
    sets = random_sets()
    with h5py.File(tmp_path / "r.mat", "w", userblock_size=512) as file:
        for name, part in (("query", sets.query), ("gallery", sets.gallery)):
            file[f"{name}_f"] = part.features.T
            file[f"{name}_label"] = part.identities[:, None].astype(float)
            file[f"{name}_cam"] = part.cameras[:, None].astype(float)
    whole = (tmp_path / "r.mat").read_bytes()
    (tmp_path / "r.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(512) + whole[512:])
    found = load_mat(tmp_path / "r.mat")
    for part, expected in zip(found[:2], sets[:2], strict=True):
        np.testing.assert_array_equal(part.features, expected.features)
        np.testing.assert_array_equal(part.identities, expected.identities)
    (tmp_path / "r.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(512) + whole[512:900])
    with pytest.raises(UserError, match=r"r\.mat: can't be read as a MATLAB v7\.3 file"):
        load_mat(tmp_path / "r.mat")


def test_numpy_files_are_refused_with_the_line_that_converts_them(tmp_path, monkeypatch):
    sets = random_sets()
    names = ("f", "label", "cam")
    arrays = {
        f"{name}_{key}": array
        for name, part in (("query", sets.query), ("gallery", sets.gallery))
        for key, array in zip(names, part[:3], strict=True)
    }
    np.savez(tmp_path / "old.npz", **arrays)
    np.save(tmp_path / "old.npy", sets.query.features)
    for name in ("old.npz", "old.npy"):
        with pytest.raises(UserError, match="a NumPy file; convert it: ") as refused:
            load_mat(tmp_path / name)
    code = re.search(r'python -c "(.*?)"', str(refused.value))[1]
    monkeypatch.chdir(tmp_path)
    exec(code)
    assert len(load_mat(tmp_path / "new.mat").gallery.features) == 60


def test_extra_keys_of_other_codes(tmp_path):
    save_mat(tmp_path / "r.mat", random_sets())
    content = {k: v for k, v in loadmat(tmp_path / "r.mat").items() if not k.startswith("__")}
    cells = np.array([["a.jpg"], ["b.jpg"]], dtype=object)
    savemat(tmp_path / "r.mat", content | {"data_dir": "", "query_files": cells, "more": 1})
    found = load_mat(tmp_path / "r.mat")
    assert found.data_dir is None
    assert found.query.files is None


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.mat: no such file"):
        load_mat(tmp_path / "none.mat")
    save_mat(tmp_path / "r.mat", random_sets())
    whole = (tmp_path / "r.mat").read_bytes()
    for cut in (0, 50, 200, len(whole) // 2, len(whole) - 9):
        (tmp_path / "cut.mat").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cut\.mat: "):
            load_mat(tmp_path / "cut.mat")
    (tmp_path / "text.mat").write_text("no MATLAB")
    with pytest.raises(UserError, match=r"text\.mat: "):
        load_mat(tmp_path / "text.mat")


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"):
        save_mat(tmp_path / "file" / "r.mat", random_sets())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_images_of_a_project_that_was_moved(tmp_path):
    """They are looked for as seen from the file first, then where they were."""
    data = tmp_path / "a" / "data"
    data.mkdir(parents=True)
    source = {"run": "r", "data_from_mat": "data"}
    save_mat(tmp_path / "a" / "r.mat", random_sets()._replace(source=source, data_dir=data))
    assert load_mat(tmp_path / "a" / "r.mat").data_dir == data
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load_mat(tmp_path / "b" / "r.mat").data_dir == tmp_path / "b" / "data"
    (tmp_path / "b" / "r.mat").rename(tmp_path / "r.mat")
    assert load_mat(tmp_path / "r.mat").data_dir == data


def test_what_the_format_cannot_hold_is_found_before_the_work(tmp_path):
    def entries(name, number=1):
        return [EvalImage(tmp_path / name, 1, 1)] * number

    check_storable("r.mat", tmp_path, {"query": entries("数 😀.jpg")}, 2048)
    with pytest.raises(UserError, match=r"r\.mat: a MATLAB v5 file holds 4 GB .* 600000 features"):
        check_storable("r.mat", tmp_path, {"query": entries("a.jpg", 600_000)}, 2048)
    with pytest.raises(UserError, match=r"a\\udcff\.jpg: a name that is not UTF-8"):
        check_storable("r.mat", tmp_path, {"query": entries("a\udcff.jpg")}, 2048)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8])
def test_rows_are_normalised_and_it_is_said(dtype, capsys):
    rows = (10 * np.random.default_rng(0).random((6, 5)) + 1).astype(dtype)
    found = unit_length(rows, "r.mat: query_f")
    assert found.dtype == np.float32
    expected = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert "r.mat: query_f: rows are " in capsys.readouterr().out
    unit_length(found, "r.mat: query_f")
    assert capsys.readouterr().out == ""  # nothing to say of rows of length 1


@pytest.mark.filterwarnings("error")
def test_rows_beyond_fp32_end_in_one_line():
    with pytest.raises(UserError, match=r"row 0 .* has NaN or infinite values"):
        unit_length(np.full((2, 3), 1e300), "r.mat: query_f")


@pytest.mark.parametrize(
    ("value", "says"), [(0, "all zeros"), (np.nan, "NaN or infinite"), (np.inf, "NaN or infinite")]
)
def test_a_row_without_direction_is_named(value, says, tmp_path):
    sets = random_sets()
    sets.gallery.features[17] = value
    save_mat(tmp_path / "r.mat", EvalSets(sets.query, sets.gallery))
    with pytest.raises(UserError, match=rf"r\.mat: gallery_f: row 17 \(counted from 0\) .*{says}"):
        load_mat(tmp_path / "r.mat")

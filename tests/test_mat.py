"""`.mat` files: ours, the original's, damaged ones."""

import numpy as np
import pytest
from conftest import FIXTURES
from scipy.io import loadmat, savemat

from reid.errors import UserError
from reid.features import FeatureSet, load_mat, save_mat


def sets(dim=4):
    rng = np.random.default_rng(0)
    return {
        name: FeatureSet(
            rng.normal(size=(rows, dim)).astype(np.float32),
            rng.integers(-1, 5, rows),
            rng.integers(1, 7, rows),
        )
        for name, rows in [("query", 3), ("gallery", 8)]
    }


def test_written_as_the_field_reads_it(tmp_path):
    written = sets()
    save_mat(tmp_path / "r.mat", **written)
    content = loadmat(tmp_path / "r.mat")
    for name, rows in [("query", 3), ("gallery", 8)]:
        assert content[f"{name}_f"].shape == (rows, 4)
        assert content[f"{name}_f"].dtype == np.float32
        assert content[f"{name}_label"].shape == content[f"{name}_cam"].shape == (1, rows)
        assert content[f"{name}_label"][0].tolist() == written[name].identities.tolist()
    for found, expected in zip(load_mat(tmp_path / "r.mat"), written.values(), strict=True):
        for a, b in zip(found, expected, strict=True):
            assert np.array_equal(a, b)


def test_a_file_of_the_original():
    query, gallery = load_mat(FIXTURES / "retrieval.mat")
    assert query.features.shape == (98, 48)
    assert gallery.identities.shape == gallery.cameras.shape == (670,)
    assert gallery.identities.min() == -1  # signed, whatever MATLAB made of it


def test_a_single_query_stays_a_row(tmp_path):
    one = sets()
    one["query"] = FeatureSet(*(field[:1] for field in one["query"]))
    save_mat(tmp_path / "r.mat", **one)
    assert load_mat(tmp_path / "r.mat")[0].features.shape == (1, 4)


@pytest.mark.parametrize("key", ["query_f", "gallery_label", "query_cam"])
def test_a_missing_key_is_named(key, tmp_path):
    save_mat(tmp_path / "r.mat", **sets())
    content = {k: v for k, v in loadmat(tmp_path / "r.mat").items() if k != key}
    savemat(tmp_path / "r.mat", {k: v for k, v in content.items() if not k.startswith("__")})
    with pytest.raises(UserError, match=rf"r\.mat: has no {key}"):
        load_mat(tmp_path / "r.mat")


def test_labels_must_match_rows(tmp_path):
    wrong = sets()
    wrong["gallery"] = wrong["gallery"]._replace(identities=np.arange(7))
    save_mat(tmp_path / "r.mat", **wrong)
    with pytest.raises(UserError, match="gallery_f is 8 x 4, but there are 7 labels"):
        load_mat(tmp_path / "r.mat")


def test_features_must_have_one_length(tmp_path):
    wrong = sets()
    wrong["query"] = sets(dim=5)["query"]
    save_mat(tmp_path / "r.mat", **wrong)
    with pytest.raises(UserError, match="query_f has 5 columns, gallery_f 4"):
        load_mat(tmp_path / "r.mat")


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.mat: no such file"):
        load_mat(tmp_path / "none.mat")
    save_mat(tmp_path / "r.mat", **sets())
    (tmp_path / "cut.mat").write_bytes((tmp_path / "r.mat").read_bytes()[:200])
    (tmp_path / "text.mat").write_text("no MATLAB")
    for name in ("cut.mat", "text.mat"):
        with pytest.raises(UserError, match=f"{name}: "):
            load_mat(tmp_path / name)


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"):
        save_mat(tmp_path / "file" / "r.mat", **sets())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]

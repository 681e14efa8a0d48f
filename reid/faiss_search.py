"""Nearest neighbours by FAISS (Douze et al., "The Faiss library", 2024), an optional dependency."""

import numpy as np
import torch
from tqdm import tqdm

from reid.errors import UserError

ROWS = 1024  # searched at a time
TRAINING = 64  # images for each list that k-means is trained on
SAMPLE = 200  # images whose neighbours are compared with the exact ones


def faiss_search(nlist=0, nprobe=16):
    """A replacement for `re_ranking.neighbours` that searches with FAISS and prints its recall.

    nlist: cells of an IVF index, of which `nprobe` are searched; 0 is a flat, exhaustive index.
    Raises UserError where FAISS is missing or the index doesn't find enough neighbours.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("--knn faiss: not installed here; pip install faiss-cpu") from error

    def search(similarity, cuts, block):
        features = similarity.features.cpu().numpy()
        size, dim = features.shape
        if nlist > size:
            raise UserError(f"--nlist {nlist}: there are only {size} images")
        index = faiss.IndexFlatIP(dim)
        if nlist:
            index = faiss.IndexIVFFlat(index, dim, nlist, faiss.METRIC_INNER_PRODUCT)
            index.nprobe = min(nprobe, nlist)
            index.cp.max_points_per_centroid = TRAINING
            index.train(features)
        index.add(features)
        count = min(max(cuts), size)
        nearest, least = np.empty((size, count), np.int64), np.empty(size, np.float32)
        with tqdm(total=size, desc="neighbours (FAISS)", unit="image", disable=None) as bar:
            for start in range(0, size, ROWS):
                rows = slice(start, start + ROWS)
                nearest[rows] = index.search(features[rows], count)[1]
                # The least similar image is the nearest to the opposite feature.
                least[rows] = -index.search(-features[rows], 1)[0][:, 0]
                bar.update(len(least[rows]))
        few = int((nearest < 0).any(axis=1).sum())
        if few:
            raise UserError(
                f"--nprobe {nprobe}: {few} images have fewer than {count} neighbours in the lists "
                "searched; raise it, or take a smaller --nlist"
            )
        nearest = torch.from_numpy(nearest).to(similarity.device)
        kind = f"IVF, {index.nprobe} of {nlist} lists" if nlist else "flat"
        print(
            f"FAISS ({kind}): recall {recall(similarity, nearest):.4f} of {count} neighbours on a "
            f"sample{'; distances are scaled by an approximate maximum, too' if nlist else ''}"
        )
        return nearest, torch.from_numpy(least).to(similarity.device)

    return search


def recall(similarity, nearest):
    """The share of exact neighbours found, on a sample of images."""
    size, count = nearest.shape
    step = max(size // SAMPLE, 1)
    rows = torch.arange(0, size, step, device=nearest.device)
    exact = similarity.exact(rows).topk(count).indices
    found = (nearest[rows][:, :, None] == exact[:, None, :]).any(2)
    return found.double().mean().item()

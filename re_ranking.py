"""k-reciprocal re-ranking (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal
Encoding", CVPR 2017), exact, and without a matrix of all images by all images.

Two images that are among each other's nearest neighbours are likely the same person. Each image is
described by its k-reciprocal neighbours, and the Jaccard distance of these descriptions is mixed
with the original distance. The formula, for features F [N, D] of nq queries, then of the gallery:

    s = F @ F.T
    d = (2 - 2 * s) / (2 - 2 * s).max(axis=1, keepdims=True)  # each row by its own maximum
    near = np.argsort(-(s + np.eye(N)), axis=1, kind="stable")  # an image itself is its nearest
    R = lambda i, k: {j for j in near[i, : k + 1] if i in near[j, : k + 1]}  # reciprocal
    V, h = np.zeros_like(d), round(k1 / 2)  # halves to even
    for i in range(N):  # R*: R(i, k1), and of its members' R(c, h) those that overlap it
        more = [R(c, h) for c in R(i, k1) if 3 * len(R(c, h) & R(i, k1)) > 2 * len(R(c, h))]
        star = sorted(R(i, k1).union(*more))
        V[i, star] = np.exp(-d[i, star]) / np.exp(-d[i, star]).sum()
    V = V[near[:, :k2]].mean(axis=1)  # the mean of the k2 nearest images' descriptions
    m = np.minimum(V[:nq, None], V[None, nq:]).sum(axis=2)
    distance = (1 - lambda_value) * (1 - m / (2 - m)) + lambda_value * d[:nq, nq:]

What follows computes the same for any size: neighbours are few, whatever the gallery's size, so
they are searched for in blocks, and descriptions are kept sparse.

    for distance in rerank(query_f, gallery_f):  # a block of queries at a time, [b, Ng]
        ...
    distance = re_ranking(query_f @ gallery_f.T, query_f @ query_f.T, gallery_f @ gallery_f.T)

Which images are among the k nearest is decided by similarity in float64 rounded to float32, ties by
the lower index, each image itself before all: the same on every device and with every block size.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

# NumPy's BLAS threads wait for work by spinning, which takes the processor from torch's: let them
# sleep (saves a fifth on two cores). Read when NumPy is first imported: later it does nothing.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

K1, K2, LAMBDA = 20, 6, 0.3  # the paper's
# More than float32 can move a dot product of unit vectors (1e-6 was seen). Neighbours whose
# similarities are as close as this are compared in float64.
FLOAT32_ERROR = 1e-5
TOLERANCE = 1e-2  # of a length or a cosine: bf16's are less exact than that
SPARE = 4  # candidates beyond those needed, so that few images must be searched for again
SMALLEST_BLOCK, LARGEST_BLOCK = 32, 1024  # rows; larger ones are hardly faster
WORK = 1 << 22  # elements of a temporary tensor where nothing else bounds it
PAIRS = 1 << 18  # the same for sums over pairs: small enough for the processor's cache
LAST = (1 << 31) - 1  # above any index
ITSELF = 2.0  # an image's similarity to itself in the search: above any other, duplicates too


def re_ranking(
    q_g_sim: np.ndarray | Tensor,
    q_q_sim: np.ndarray | Tensor,
    g_g_sim: np.ndarray | Tensor,
    k1: int = K1,
    k2: int = K2,
    lambda_value: float = LAMBDA,
) -> np.ndarray:
    """Return re-ranked distances between queries and gallery, float32 [Nq, Ng]; small is near.

    q_g_sim [Nq, Ng], q_q_sim [Nq, Nq], g_g_sim [Ng, Ng]: cosine similarities (dot products of
    L2-normalised features), arrays or tensors.
    k1: neighbours that a reciprocal set is made of. k2: neighbours that a description is averaged
    over. lambda_value: weight of the original distance against the Jaccard distance.

    The three matrices need the square of the images in memory; `rerank` needs only features.
    Raises ValueError for distances, NaN, shapes that don't fit, other k or lambda_value.
    """
    check_settings(k1, k2, lambda_value)
    check_similarities(q_g_sim, q_q_sim, g_g_sim)
    similarity = Matrices(q_g_sim, q_q_sim, g_g_sim)
    blocks = _rerank(similarity, len(q_g_sim), k1, k2, lambda_value, LARGEST_BLOCK)
    return np.concatenate(list(blocks))


def rerank(
    query_f: np.ndarray,
    gallery_f: np.ndarray,
    k1: int = K1,
    k2: int = K2,
    lambda_value: float = LAMBDA,
    plan: "Plan | None" = None,
    device: str | torch.device = "cpu",
) -> Iterator[np.ndarray]:
    """Yield the re-ranked distances of a few queries at a time: float32 arrays [b, Ng].

    query_f [Nq, D], gallery_f [Ng, D]: L2-normalised features.
    k1, k2, lambda_value: as in `re_ranking`. plan: see `make_plan`.
    Raises ValueError for features that aren't L2-normalised, and as `re_ranking`.
    """
    check_settings(k1, k2, lambda_value)
    check_features(query_f, gallery_f)
    plan = plan or make_plan(len(query_f), *gallery_f.shape, k1, k2)
    features = np.concatenate([query_f, gallery_f], dtype=np.float32)
    features = torch.from_numpy(features).to(device)
    similarity = Features(features, len(query_f) if plan.keep else 0)
    return _rerank(similarity, len(query_f), k1, k2, lambda_value, plan.block)


def _rerank(similarity, num_query, k1, k2, lambda_value, block):
    nearest, least = neighbours(similarity, boundaries(k1, k2), block)
    widest = (2 - 2 * least).clamp_min(FLOAT32_ERROR)  # 0 only where all images are the same one
    weights = averaged(descriptions(similarity, nearest, widest, k1), nearest[:, :k2])
    inverted = weights.rows(num_query, similarity.size).transposed()
    with tqdm(total=num_query, desc="distances", unit="query", delay=1, disable=None) as bar:
        rows = query_rows(block, similarity.size - num_query)
        for start in range(0, num_query, rows):
            stop = min(start + rows, num_query)
            scale = -2 * lambda_value / widest[start:stop, None]
            distance = similarity.block(start, stop, num_query).mul_(scale).sub_(scale)
            # The Jaccard distance 1 - m / (2 - m) is 2 - 2 / (2 - m).
            shared = common_weight(weights.rows(start, stop), inverted)
            distance.sub_(shared.neg_().add_(2).reciprocal_().sub_(1), alpha=2 * (1 - lambda_value))
            yield distance.cpu().numpy().copy()
            bar.update(stop - start)


# --- arguments ----------------------------------------------------------------------------------


def check_settings(k1, k2, lambda_value):
    """Raise ValueError where a setting can't be."""
    if k1 < 1 or k2 < 1 or not 0 <= lambda_value <= 1:
        raise ValueError(
            f"expected k1 and k2 of 1 or more, lambda_value from 0 to 1; got {k1}, {k2}, "
            f"{lambda_value}"
        )


def check_similarities(q_g_sim, q_q_sim, g_g_sim):
    """Raise ValueError unless these are cosine similarities of queries and a gallery."""
    shape = len(q_g_sim), len(g_g_sim)
    matrices = {"q_g_sim": q_g_sim, "q_q_sim": q_q_sim, "g_g_sim": g_g_sim}
    shapes = shape, (shape[0], shape[0]), (shape[1], shape[1])
    for (name, matrix), expected in zip(matrices.items(), shapes, strict=True):
        if tuple(matrix.shape) != expected or 0 in expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(matrix.shape)}")
        low, high = float(matrix.min()), float(matrix.max())
        if not -1 - TOLERANCE <= low <= high <= 1 + TOLERANCE:  # nor NaN
            raise ValueError(
                f"{name}: expected cosine similarities, -1 to 1; got {low:.4g} to {high:.4g}: "
                "distances?"
            )
        # Of an image with itself: in distances that is 0.
        if name != "q_g_sim" and abs(float(matrix.diagonal().min()) - 1) > TOLERANCE:
            raise ValueError(
                f"{name}: expected cosine similarities, 1 on the diagonal; got "
                f"{float(matrix.diagonal().min()):.4g}: distances?"
            )


def check_features(query_f, gallery_f):
    """Raise ValueError unless these are L2-normalised features of one length."""
    for name, features in ("query_f", query_f), ("gallery_f", gallery_f):
        if features.ndim != 2 or 0 in features.shape or features.shape[1] != query_f.shape[1]:
            raise ValueError(f"{name}: expected features [N, D], got {tuple(features.shape)}")
        squares = np.einsum("nd,nd->n", features, features)
        if not np.abs(squares - 1).max() <= TOLERANCE:  # nor NaN
            raise ValueError(f"{name}: expected L2-normalised rows, got lengths other than 1")


# --- similarities -------------------------------------------------------------------------------


class Features:
    """Dot products of features [N, D], computed when they are asked for.

    keep: number of queries, the first images, whose similarities to the gallery are cached.
    """

    def __init__(self, features, keep=0):
        self.features = features
        self.size = len(features)
        self.device = features.device
        self.buffer = features.new_empty(0)
        self.kept = features.new_empty((keep, self.size - keep))

    def block(self, start, stop, first):
        """Return images start..stop times first..N, valid until the next call."""
        keep = len(self.kept)
        if first == keep and stop <= keep:  # made before, in the search for neighbours
            return self.kept[start:stop]
        shape = stop - start, self.size - first
        if self.buffer.numel() < shape[0] * shape[1]:
            self.buffer = self.features.new_empty(shape[0] * shape[1])
        out = self.buffer[: shape[0] * shape[1]].view(shape)
        ours, theirs = self.features[start:stop], self.features[first:]
        if self.device.type == "cpu":
            # NumPy's BLAS is up to twice as fast here as torch's, on AMD's processors.
            np.matmul(ours.numpy(), theirs.numpy().T, out=out.numpy())
        else:
            with exact_float32():
                torch.mm(ours, theirs.T, out=out)
        if start < keep:
            self.kept[start:stop] = out[: keep - start, keep - first :]
        return out

    def exact(self, rows, columns=None):
        """Return float64 products, rounded to float32, of rows [b] with columns [b, c], or all."""
        ours = self.features[rows].double()
        if columns is not None:
            return torch.bmm(self.features[columns].double(), ours[:, :, None])[:, :, 0].float()
        parts = self.features.split(4096)
        return torch.cat([(ours @ part.double().T).float() for part in parts], dim=1)

    def pairs(self, start, starts, columns):
        """Return products of image start + i with columns[starts[i]:starts[i + 1]], for each i."""
        shape = len(starts) - 1, self.size
        with warnings.catch_warnings(action="ignore"):  # "CSR is in beta"
            where = torch.sparse_csr_tensor(
                starts, columns, torch.zeros(len(columns), device=self.device), shape
            )
        ours = self.features[start : start + shape[0]]
        return torch.sparse.sampled_addmm(where, ours, self.features.T, beta=0).values()


@contextmanager
def exact_float32():
    """Switch off TF32 where the process has allowed it: its errors are a hundred times larger."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Matrices:
    """The three similarity matrices in one, queries before gallery; used like `Features`."""

    def __init__(self, q_g, q_q, g_g):
        self.q_g, self.q_q, self.g_g = (
            torch.as_tensor(matrix, dtype=torch.float32) for matrix in (q_g, q_q, g_g)
        )
        self.num_query = len(self.q_g)
        self.size = self.num_query + len(self.g_g)
        self.device = self.q_g.device

    def exact(self, rows, columns=None):
        """Return similarities of rows [b], sorted, with columns [b, c], or with all images."""
        q = rows[rows < self.num_query]
        g = rows[rows >= self.num_query] - self.num_query
        block = torch.cat(
            [
                torch.cat([self.q_q[q], self.q_g[q]], dim=1),
                torch.cat([self.q_g.T[g], self.g_g[g]], dim=1),
            ]
        )
        return block if columns is None else block.gather(1, columns)

    def block(self, start, stop, first):
        """Return images start..stop times first..N: [stop - start, N - first]."""
        return self.exact(torch.arange(start, stop, device=self.device))[:, first:]

    def pairs(self, start, starts, columns):
        """Return the pairs' similarities, as `Features.pairs` does."""
        block = self.block(start, start + len(starts) - 1, 0)
        return block[row_numbers(starts), columns]


# --- neighbours ---------------------------------------------------------------------------------


def boundaries(k1, k2):
    """Return the lengths of neighbour lists for R(i, k1), R(i, k1 / 2) and the mean over k2."""
    return k1 + 1, half(k1) + 1, k2


def half(k1):
    return round(k1 / 2)  # Python rounds halves to even, as the formula asks


def neighbours(similarity: Features | Matrices, cuts: tuple, block: int) -> tuple[Tensor, Tensor]:
    """Search for the max(cuts) nearest images of each image, and for its least similarity.

    An image is among its own neighbours.

    Returns int64 [N, <= max(cuts)], nearest first, and float32 [N]. The first `cut` of a list are
    certain for each of `cuts`; their order among themselves is not.

    Similarity is symmetric, so only half of it is made: a block's images with themselves and with
    those to come. It gives the former candidates out of its rows, the latter out of its columns.
    Candidates are int64 that sort: similarity in the upper half, index in the lower.
    """
    size, device = similarity.size, similarity.device
    keep = min(size, max(cuts) + SPARE)
    best = torch.full((size, keep), EMPTY, device=device)
    least = torch.full((size,), torch.inf, device=device)
    with tqdm(total=size, desc="neighbours", unit="image", delay=1, disable=None) as bar:
        for start in range(0, size, block):
            stop = min(start + block, size)
            scores = similarity.block(start, stop, start)
            torch.minimum(least[start:stop], scores.amin(1), out=least[start:stop])
            scores.fill_diagonal_(ITSELF)
            values, columns = scores.topk(min(keep, size - start))
            candidates = torch.cat([best[start:stop], keys(values, columns + start)], dim=1)
            best[start:stop] = candidates.topk(keep).values
            if stop < size:
                scores = scores[:, stop - start :]
                torch.minimum(least[stop:], scores.amin(0), out=least[stop:])
                width = max(1, WORK // block)
                for part, to in zip(scores.split(width, 1), best[stop:].split(width), strict=True):
                    offer(part, start, to)
            bar.update(stop - start)
    settle(similarity, best, cuts)
    return indices(best[:, : max(cuts)]), least


def offer(scores, first, best):
    """Enter images first, first + 1, ... among the candidates of others where they are better.

    scores: [images, others]. best: [others, keep], changed in place.
    """
    if first == 0:  # nothing to compare with yet
        values, image = scores.topk(min(best.shape[1], len(scores)), dim=0)
        best[:, : len(values)] = keys(values, image).T
        return
    image, other = (scores > similarities(best[:, -1])).nonzero(as_tuple=True)
    if len(image) == 0:
        return
    # The better ones of each of the others, side by side: a table with a row for each.
    other, order = other.sort(stable=True)
    image = image[order]
    counts = other.bincount(minlength=len(best))
    column = torch.arange(len(other), device=other.device) - (counts.cumsum(0) - counts)[other]
    table = best.new_full((len(best), int(counts.max())), EMPTY)
    table[other, column] = keys(scores[image, other], image + first)
    best.copy_(torch.cat([best, table], dim=1).topk(best.shape[1]).values)


def settle(similarity, best, cuts):
    """Compare again in float64 what float32 can't tell apart at a cut; changes `best` in place."""
    value, keep = similarities(best), best.shape[1]
    needed = min(max(cuts), keep)
    close = torch.zeros(len(best), dtype=bool, device=best.device)
    for cut in cuts:
        if cut < keep:
            close |= value[:, cut - 1] - value[:, cut] <= FLOAT32_ERROR
    # Images beyond the candidates may be as near as the last one needed: all must be looked at.
    beyond = value[:, needed - 1] - value[:, -1] <= FLOAT32_ERROR
    if keep == similarity.size:
        beyond[:] = False
    few, many = (close & ~beyond).nonzero()[:, 0], beyond.nonzero()[:, 0]
    number = len(few) + len(many)
    with tqdm(total=number, desc="near ties", unit="image", delay=1, disable=None) as bar:
        for rows in few.split(64):
            best[rows] = exact_keys(similarity, rows, indices(best[rows])).topk(keep).values
            bar.update(len(rows))
        for rows in many.split(max(1, WORK // similarity.size)):
            best[rows] = exact_keys(similarity, rows).topk(keep).values
            bar.update(len(rows))


def exact_keys(similarity, rows, columns=None):
    """Return keys of the exact similarities of rows [b] with columns [b, c], or all images."""
    exact = similarity.exact(rows, columns)
    if columns is None:
        columns = torch.arange(similarity.size, device=rows.device).expand(len(rows), -1)
    return keys(exact.masked_fill(columns == rows[:, None], ITSELF), columns)


def keys(similarity, index):
    """Pack similarities (float32) and indices into int64 that sort by similarity, then index."""
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0 makes -0.0 the equal of 0.0
    bits = bits ^ ((bits >> 31) & LAST)  # negative floats sort backwards
    return (bits.long() << 32) | (LAST - index)


def similarities(key):
    bits = (key >> 32).int()
    return (bits ^ ((bits >> 31) & LAST)).view(torch.float32)


def indices(key):
    return LAST - (key & 0xFFFFFFFF)


EMPTY = keys(torch.tensor(-torch.inf), 0).item()


# --- descriptions -------------------------------------------------------------------------------


class SparseRows(NamedTuple):
    """A sparse matrix of `width` columns; row i is columns[starts[i]:starts[i + 1]] and values."""

    starts: Tensor
    columns: Tensor
    values: Tensor
    width: int

    def rows(self, start, stop):
        """Return rows start..stop."""
        first, last = self.starts[start].item(), self.starts[stop].item()
        return SparseRows(
            self.starts[start : stop + 1] - first,
            self.columns[first:last],
            self.values[first:last],
            self.width,
        )

    def transposed(self):
        """Return columns as rows: for each image, the descriptions that it is part of."""
        columns, order = self.columns.sort(stable=True)
        starts = offsets(columns.bincount(minlength=self.width))
        return SparseRows(
            starts, row_numbers(self.starts)[order], self.values[order], len(self.starts) - 1
        )


def offsets(counts):
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def row_numbers(starts):
    rows = torch.arange(len(starts) - 1, device=starts.device)
    return rows.repeat_interleave(starts.diff())


def reciprocal(nearest, start, stop, k):
    """Tell which of the k + 1 nearest of images start..stop have them among theirs, [b, k + 1]."""
    nearest = nearest[:, : k + 1]
    image = torch.arange(start, stop, device=nearest.device)
    return (nearest[nearest[start:stop]] == image[:, None, None]).any(2)


def descriptions(similarity, nearest, widest, k1):
    """Compute V of the formula, each image's weights over its set R*: SparseRows [N, N]."""
    size = similarity.size
    count = min(k1 + 1, size)
    short = half(k1)
    chunk = max(1, WORK // (count * count * (short + 1)))
    starts = range(0, size, chunk)
    theirs_in = torch.cat([reciprocal(nearest, s, min(s + chunk, size), short) for s in starts])
    parts = []
    for start in starts:
        stop = min(start + chunk, size)
        members = nearest[start:stop, : k1 + 1]
        inside = reciprocal(nearest, start, stop, k1)
        members = torch.where(inside, members, -1)
        theirs = nearest[members, : short + 1]
        valid = theirs_in[members] & inside[:, :, None]
        shared = (theirs[:, :, :, None] == members[:, None, None, :]).any(3) & valid
        take = 3 * shared.sum(2) > 2 * valid.sum(2)
        theirs = torch.where(valid & take[:, :, None], theirs, -1)
        expanded = torch.cat([members, theirs.flatten(1)], dim=1).sort().values
        new = expanded >= 0
        new[:, 1:] &= expanded[:, 1:] != expanded[:, :-1]
        row_starts, columns = offsets(new.sum(1)), expanded[new]
        row = row_numbers(row_starts)
        distance = (2 - 2 * similarity.pairs(start, row_starts, columns)) / widest[start:stop][row]
        closeness = torch.exp(-distance)
        total = closeness.new_zeros(stop - start).index_add_(0, row, closeness)
        parts.append((new.sum(1), columns, closeness / total[row]))
    counts, columns, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return SparseRows(offsets(counts), columns, values, size)


def averaged(weights, nearest):
    """Average the descriptions of each image's `nearest` [N, k2]: SparseRows [N, N]."""
    size, k2 = nearest.shape
    if k2 == 1:
        return weights
    lengths = weights.starts.diff()
    entries = lengths[nearest].sum(1).cumsum(0)  # a limited number of them at a time
    sizes = torch.div(entries, WORK // 8, rounding_mode="floor").bincount().tolist()
    parts = []
    for rows in nearest.split(sizes):
        if len(rows) == 0:
            continue
        starts = offsets(lengths[rows.flatten()])
        source = row_numbers(starts)
        entry = (
            torch.arange(len(source), device=source.device)
            - starts[source]
            + weights.starts[rows.flatten()][source]
        )
        key = torch.div(source, k2, rounding_mode="floor") * size + weights.columns[entry]
        key, position = key.unique(return_inverse=True)
        values = weights.values.new_zeros(len(key)).index_add_(
            0, position, weights.values[entry] / k2
        )
        row = torch.div(key, size, rounding_mode="floor")
        parts.append((row.bincount(minlength=len(rows)), key - row * size, values))
    counts, columns, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return SparseRows(offsets(counts), columns, values, size)


def common_weight(queries, inverted):
    """Compute sum_j min(V_qj, V_gj) for each query and gallery image: float32 [b, Ng].

    Only images that share a neighbour j have any; `inverted` lists, for each j, the gallery images
    that have it in their description.
    """
    out = queries.values.new_zeros(len(queries.starts) - 1, inverted.width)
    base = row_numbers(queries.starts) * inverted.width  # where in `out` an entry's row begins
    lists = inverted.starts[queries.columns]
    lengths = inverted.starts[queries.columns + 1] - lists
    ends = lengths.cumsum(0)
    pairs = int(ends[-1]) if len(ends) else 0
    shift = lists - (ends - lengths)  # from a pair's number to its position in `inverted`
    for start in range(0, pairs, PAIRS):
        pair = torch.arange(start, min(start + PAIRS, pairs), device=ends.device)
        entry = torch.searchsorted(ends, pair, right=True)
        position = pair + shift[entry]
        minimum = torch.minimum(queries.values[entry], inverted.values[position])
        out.view(-1).scatter_add_(0, base[entry] + inverted.columns[position], minimum)
    return out


# --- memory -------------------------------------------------------------------------------------


def query_rows(block, num_gallery):
    """Return how many queries' distances are computed at a time.

    Their arrays stay under 32 MB with a gallery of up to 110,000 images (for a larger one they are
    64 rows): malloc reuses that memory, while new memory would take as long as the computation.
    """
    return min(block, max(64, (7 << 20) // num_gallery))


class Plan(NamedTuple):
    """A way to re-rank: images in a block, whether to keep the queries' similarities, GB needed."""

    block: int
    keep: bool
    memory: float


def make_plan(
    num_query: int,
    num_gallery: int,
    dim: int,
    k1: int = K1,
    k2: int = K2,
    memory: float | None = None,
) -> "Plan | None":
    """Return the fastest Plan that needs at most `memory` GB beside the features, or None.

    Keeping the similarities of queries and gallery saves a tenth of the time. Where memory isn't
    limited, they are kept up to 1 GB.
    """
    worth = 4e-9 * num_query * num_gallery <= (memory or 1)
    for keep in (True, False) if worth else (False,):
        block = LARGEST_BLOCK
        while block >= SMALLEST_BLOCK:
            needed = memory_needed(num_query, num_gallery, dim, k1, k2, block, keep)
            if memory is None or needed <= memory:
                return Plan(block, keep, needed)
            block //= 2
    return None


def memory_needed(
    num_query: int, num_gallery: int, dim: int, k1: int, k2: int, block: int, keep: bool
) -> float:
    """Estimate how many GB `rerank` takes beside the features given to it."""
    size = num_query + num_gallery
    candidates = 2.5 * 8 * (max(boundaries(k1, k2)) + SPARE)
    described = 3 * 12 * k2 * k1  # seen: fewer, where images of a person are each other's nearest
    blocks = 4 * block * size + 3 * 4 * query_rows(block, num_gallery) * num_gallery
    kept = 4 * num_query * num_gallery if keep else 0
    return (size * (4 * dim + candidates + described) + blocks + kept + 40 * WORK) / 1e9

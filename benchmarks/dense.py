"""Scoring and re-ranking the plain way: one query at a time, whole matrices, NumPy only.

What benchmarks/scoring.py measures against and what the tests take for the truth. As a script it
does what evaluate.py and evaluate_rerank.py do, the way their predecessors of 2018 work:

    python benchmarks/dense.py evaluate pytorch_result.mat
    python benchmarks/dense.py rerank pytorch_result.mat
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from scipy.io import loadmat


def evaluate(similarity_of, query, gallery):
    """CMC [Ng], AP by trapezoids [Nq], standard AP [Nq] and INP [Nq].

    similarity_of: number of a query -> its similarities [Ng]. query, gallery: (ids, cameras).
    """
    cmc = np.zeros(len(gallery[0]))
    scores = np.zeros((3, len(query[0])))
    for number, (identity, camera) in enumerate(zip(*query, strict=True)):
        order = np.argsort(-similarity_of(number), kind="stable")
        same = np.flatnonzero(gallery[0] == identity)
        same_camera = np.flatnonzero(gallery[1] == camera)
        good = np.setdiff1d(same, same_camera)
        junk = np.union1d(np.intersect1d(same, same_camera), np.flatnonzero(gallery[0] == -1))
        good = np.setdiff1d(good, junk)
        order = order[np.isin(order, junk, invert=True)]
        ranks = np.flatnonzero(np.isin(order, good))
        if len(ranks) == 0:
            continue
        cmc[ranks[0] :] += 1
        for i, rank in enumerate(ranks):
            precision = (i + 1) / (rank + 1)
            before = i / rank if rank else 1.0
            scores[0, number] += (before + precision) / 2 / len(ranks)
            scores[1, number] += precision / len(ranks)
        scores[2, number] = len(ranks) / (ranks[-1] + 1)
    return cmc / len(query[0]), *scores


def re_ranking(q_g, q_q, g_g, k1=20, k2=6, lambda_value=0.3, sort="stable"):
    """Re-ranked distances [Nq, Ng] by the formula of Zhong et al. (CVPR 2017), dense.

    q_g, q_q, g_g: similarities of unit vectors. sort: "stable" gives ties to the lower index.
    """
    num_query = len(q_g)
    similarity = np.block([[q_q, q_g], [q_g.T, g_g]])
    distance = 2 - 2 * similarity
    np.fill_diagonal(similarity, 2)  # each image is its own first neighbour
    order = np.argsort(-similarity, axis=1, kind=sort).astype(np.int32)
    del similarity
    distance /= np.maximum(distance.max(axis=1, keepdims=True), 1e-5)
    weights = np.zeros_like(distance)
    half = round(k1 / 2)
    for i in range(len(distance)):
        members = reciprocal(order, i, k1)
        expanded = [members]
        for candidate in members:
            theirs = reciprocal(order, candidate, half)
            if 3 * len(np.intersect1d(theirs, members)) > 2 * len(theirs):
                expanded.append(theirs)
        expanded = np.unique(np.concatenate(expanded))
        closeness = np.exp(-distance[i, expanded])
        weights[i, expanded] = closeness / closeness.sum()
    distance = distance[:num_query, num_query:].copy()
    if k2 != 1:
        weights = np.stack([weights[row[:k2]].mean(axis=0) for row in order])
    del order
    gallery = weights[num_query:]
    holders = [np.flatnonzero(column) for column in gallery.T]
    for q in range(num_query):
        common = np.zeros(len(gallery), weights.dtype)
        for j in np.flatnonzero(weights[q]):
            common[holders[j]] += np.minimum(weights[q, j], gallery[holders[j], j])
        jaccard = 1 - common / (2 - common)
        distance[q] = (1 - lambda_value) * jaccard + lambda_value * distance[q]
    return distance


def reciprocal(order, i, k):
    """R(i, k): of the k + 1 nearest of i, those that have it among their k + 1 nearest."""
    nearest = order[i, : k + 1]
    return nearest[(order[nearest, : k + 1] == i).any(axis=1)]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Score or re-rank a .mat file the plain way.")
    parser.add_argument("what", choices=["evaluate", "rerank"])
    parser.add_argument("mat")
    parser.add_argument("--save", help="a .npy file for the re-ranked distances")
    args = parser.parse_args(argv)
    content = loadmat(args.mat)
    features = [content[f"{name}_f"] for name in ("query", "gallery")]
    labels = [
        [content[f"{name}_{what}"][0] for what in ("label", "cam")] for name in ("query", "gallery")
    ]
    started = time.perf_counter()
    q, g = features
    if args.what == "rerank":
        distance = re_ranking(q @ g.T, q @ q.T, g @ g.T, sort="quicksort")
        print(f"re-ranked in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        scores = evaluate(lambda number: -distance[number], *labels)
        if args.save:
            np.save(Path(args.save), distance)
    else:
        scores = evaluate(lambda number: g @ q[number], *labels)
    cmc, ap = scores[:2]
    print(f"top1:{cmc[0]:.6f} top5:{cmc[4]:.6f} top10:{cmc[9]:.6f} mAP:{ap.mean():.6f}")
    print(f"computed in {time.perf_counter() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

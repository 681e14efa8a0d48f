"""k-reciprocal re-ranking (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal
Encoding", CVPR 2017).

Two images that are among each other's nearest neighbours are likely the same person. Each image is
described by its k-reciprocal neighbours, and the Jaccard distance of these descriptions is mixed
with the original distance.

    distance = re_ranking(query_f @ gallery_f.T, query_f @ query_f.T, gallery_f @ gallery_f.T)
"""

import numpy as np


def re_ranking(q_g_sim, q_q_sim, g_g_sim, k1=20, k2=6, lambda_value=0.3):
    """Re-ranked distances between queries and gallery, float32 [Nq, Ng]; smaller is nearer.

    q_g_sim [Nq, Ng], q_q_sim [Nq, Nq], g_g_sim [Ng, Ng]: cosine similarities (dot products of
    L2-normalised features).
    k1: neighbours that a reciprocal set is made of. k2: neighbours that a description is averaged
    over. lambda_value: weight of the original distance against the Jaccard distance.

    Memory is about six float32 matrices of (Nq + Ng) squared: at Market-1501's size, 13 GB.
    """
    num_query = len(q_g_sim)
    distance = normalised_distance(q_g_sim, q_q_sim, g_g_sim)
    # Sorted with a stable sort, so that ties go to the lower index on every machine.
    nearest = np.argsort(distance, axis=1, kind="stable")[:, : max(k1 + 1, k2)].astype(np.int32)
    weights = reciprocal_weights(distance, nearest, k1)
    if k2 != 1:
        weights = np.stack([weights[nearest[i, :k2]].mean(axis=0) for i in range(len(weights))])
    distance = distance[:num_query, num_query:]
    jaccard = jaccard_distance(weights[:num_query], weights[num_query:])
    return (1 - lambda_value) * jaccard + lambda_value * distance


def normalised_distance(q_g_sim, q_q_sim, g_g_sim):
    """Distances 2 - 2 f_i.f_j of queries then gallery, each row divided by its own maximum."""
    similarity = np.block([[q_q_sim, q_g_sim], [np.transpose(q_g_sim), g_g_sim]])
    distance = 2 - 2 * similarity.astype(np.float32)
    return distance / distance.max(axis=1, keepdims=True)


def reciprocal_weights(distance, nearest, k1):
    """The description of each image: float32 [N, N], rows sum to 1 over the expanded set R*."""
    half = round(k1 / 2)  # Python rounds halves to even, as the formula asks
    sets = k_reciprocal(nearest, k1)
    half_sets = k_reciprocal(nearest, half)
    weights = np.zeros_like(distance)
    for i, members in enumerate(sets):
        expanded = [members]
        for candidate in members:
            theirs = half_sets[candidate]
            if len(np.intersect1d(theirs, members)) > 2 / 3 * len(theirs):
                expanded.append(theirs)
        columns = np.unique(np.concatenate(expanded))
        closeness = np.exp(-distance[i, columns])
        weights[i, columns] = closeness / closeness.sum()
    return weights


def k_reciprocal(nearest, k):
    """R(i, k) of each image: those of its k + 1 nearest that have it among theirs.

    nearest: int [N, >= k + 1], each row an image's neighbours, nearest first, itself included.
    """
    nearest = nearest[:, : k + 1]
    return [row[(nearest[row] == i).any(axis=1)] for i, row in enumerate(nearest)]


def jaccard_distance(queries, gallery):
    """1 - m / (2 - m) with m = sum_j min(V_qj, V_gj): descriptions to distances [Nq, Ng]."""
    distance = np.empty((len(queries), len(gallery)), dtype=np.float32)
    for q, row in enumerate(queries):
        columns = np.flatnonzero(row)  # elsewhere the minimum is zero
        minimum = np.minimum(row[columns], gallery[:, columns]).sum(axis=1)
        distance[q] = 1 - minimum / (2 - minimum)
    return distance

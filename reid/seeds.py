"""Scores over several training seeds: mean, 95 % interval, and differences paired by seed.

They say how a score varies from one training to the next, on the same test people.
`reid/bootstrap.py` says how one network's score varies over other people.
"""

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95


def mean_interval(values):
    """Mean of `values`, one a seed, and its 95 % interval [low, high] by Student's t.

    The interval is None with one seed: a single training says nothing of how others would end.
    """
    values = np.array([*values], float)
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return mean, None
    reach = stdtrit(count - 1, (1 + LEVEL) / 2) * values.std(ddof=1) / np.sqrt(count)
    return mean, [float(mean - reach), float(mean + reach)]


def paired_difference(scores, baseline):
    """Mean and interval of `scores - baseline`: dicts from seed to score, of the same seeds.

    Runs of one seed start from the same weights and see the real images in orders that follow
    from it, so what they share cancels in each seed's difference.
    """
    if scores.keys() != baseline.keys():
        raise ValueError(f"seeds differ: {sorted(scores)} and {sorted(baseline)}")
    return mean_interval([scores[seed] - baseline[seed] for seed in scores])

"""Are two images of one person? The similarity from which on to say yes, and how often that errs.

Pairs of a query and a gallery image are of two kinds, by the rules of `reid.metrics`: genuine, of
one person in two cameras, and impostor, of two people (a distractor is another person); pairs with
junk are left out. At a threshold, a query's false-match rate is the share of its impostor pairs
that reach it, its true-match rate the share of its genuine ones (terms of ISO/IEC 19795-1); rates
are means over the queries that have such pairs.
"""

from pathlib import Path

import numpy as np

from reid import intervals
from reid.errors import UserError
from reid.files import check_writable, demand, read_json, sha256, write_json
from reid.mat import LOCATIONS, load_mat
from reid.metrics import Relevance, similarity_blocks
from reid.provenance import provenance

FILE = "threshold.json"  # in the run folder
BINS = 200_000  # of similarities from -1 to 1: a threshold is exact to 1e-5
KNOWN_PEOPLE = "of people that the network was trained on: it confuses others more often"
FEWEST = 10  # impostor pairs that must reach a threshold for its rate to mean something


def calibrate(mat, rate):
    """Find the threshold at a false-match rate on the pairs of a .mat file; store it in the run.

    Prints what it found. Raises UserError where the file is another code's, or has too few pairs.
    """
    sets = load_mat(mat)
    if sets.source is None:
        raise UserError(f"{mat}: doesn't say which run made it; write it with our test.py")
    path = run_folder(mat, sets.source) / FILE
    check_writable(path)
    threshold = threshold_at(rate, sets.query, sets.gallery)
    found = rates(threshold, sets.query, sets.gallery)
    print(say(found))
    split = sets.source.get("split")
    if split == "val":
        print(f"  {KNOWN_PEOPLE}")
    origin = {"mat": str(mat), "queries": split, "made_by": made_by(sets.source)}
    write_json(path, {**found, "asked_rate": rate, **origin, **provenance()})
    print(f"{path}: search.py takes the threshold from there")


def run_places(mat, source):
    """Where the run folder of a .mat file may be, the likeliest first.

    Paths are hints: the file, or the whole project, may have been moved or copied since.
    """
    own = Path(mat).resolve().parent
    there = Path(source["run"])
    places = [own / source["run_from_mat"]] if "run_from_mat" in source else []
    places += [own] if own.name == there.name else []
    return [place for place in [*places, there] if place.is_dir()]


def run_folder(mat, source):
    """The run folder that has the weights which made a .mat file's features.

    Raises UserError where none has.
    """
    weights = source.get("weights_sha256")
    for place in run_places(mat, source):
        if weights is None or weights in map(sha256, place.glob("net_*.pth")):
            return place
    raise UserError(
        f"{mat}: the run that made it, {source['run']}, is gone or has other weights by now; write "
        "the file again with test.py"
    )


def at_stored_threshold(mat, sets):
    """`rates` of a file's EvalSets at the threshold of the run they are of; None without one."""
    for place in run_places(mat, sets.source) if sets.source else []:
        stored = stored_threshold(place)
        if stored and stored["made_by"] == made_by(sets.source):
            return rates(stored["threshold"], sets.query, sets.gallery)
    return None


def stored_threshold(run):
    """What `calibrate` stored in a run folder, as a dict; None where nothing is."""
    path = Path(run) / FILE
    if not path.exists():
        return None
    advice = "calibrate again"
    stored = read_json(path, advice)
    types = {"threshold": float, "false_match_rate": float, "impostors": int, "made_by": dict}
    demand(stored, path, advice, **types)
    return stored


def made_by(source):
    """Of a .mat file's source, what tells whether features compare: `reid.features.made_by`."""
    return {name: value for name, value in source.items() if name not in LOCATIONS}


def threshold_at(rate, query, gallery):
    """The lowest similarity, in steps of 1e-5, whose false-match rate is `rate` or less."""
    shares, queries, total = np.zeros(BINS), 0, 0
    for impostors, _ in pairs(query, gallery):
        if len(impostors):
            steps = ((impostors.astype(np.float64) + 1) * (BINS / 2)).astype(np.int64)
            counts = np.bincount(steps.clip(0, BINS - 1), minlength=BINS)
            shares += counts / len(impostors)
            queries, total = queries + 1, total + len(impostors)
    if total * rate < FEWEST:
        raise UserError(
            f"--calibrate {rate:g}: too low a rate to be seen in {total:,} pairs of two people; "
            f"{FEWEST / max(total, 1):.1g} or more can be"
        )
    reaching = shares[::-1].cumsum()[::-1] / queries  # the rate at each step
    allowed = rate * (1 + 1e-9)  # sums in another order differ in their last digits
    if reaching[-1] > allowed:
        raise UserError(
            f"--calibrate {rate:g}: {100 * reaching[-1]:.3g} % of pairs of two people are of equal "
            "features; is it the right run, are the labels right?"
        )
    return float((reaching > allowed).sum() / (BINS / 2) - 1)


def rates(threshold, query, gallery):
    """Both rates at a threshold, with 95 % intervals over people (`reid.intervals`): a dict."""
    reaching, count = [], []  # of each query's impostor and genuine pairs
    for both in pairs(query, gallery):
        reaching.append([np.count_nonzero(values >= threshold) for values in both])
        count.append([len(values) for values in both])
    reaching, count = np.array(reaching), np.array(count)
    impostors, genuine = count.sum(axis=0).tolist()
    found = {"threshold": threshold, "impostors": impostors, "genuine": genuine}
    for column, name in enumerate(("false_match", "true_match")):
        some = count[:, column] > 0
        shares = reaching[some, column] / count[some, column]
        found |= estimate(name, shares, query.identities[some])
    return found


def estimate(name, shares, identities):
    """A rate, the mean of queries' shares [N], and its interval as a dict; None: there is none."""
    found = {f"{name}_rate": None, f"{name}_interval": None}
    if len(shares):
        low, high = intervals.interval(shares[:, None], identities)
        found[f"{name}_rate"] = float(shares.mean())
        if not np.isnan(low[0]):
            found[f"{name}_interval"] = [float(low[0]), float(high[0])]
    return found


def say(found):
    """What `rates` found, in a line."""
    return (
        f"threshold {found['threshold']:.4f}: "
        f"false-match rate {share(found, 'false_match')} of {found['impostors']:,} pairs, "
        f"true-match rate {share(found, 'true_match')} of {found['genuine']:,} "
        "(95 % intervals over other people)"
    )


def share(found, name):
    value, bounds = found[f"{name}_rate"], found[f"{name}_interval"]
    if value is None:
        return "unknown"
    text = f"{100 * value:.3g} %"
    return text if bounds is None else f"{text} ({100 * bounds[0]:.3g} to {100 * bounds[1]:.3g})"


def pairs(query, gallery):
    """For each query the similarities of its impostor and of its genuine pairs: float32 arrays."""
    relevance = Relevance(gallery)
    number = 0
    for block in similarity_blocks(query, gallery):
        for row in block:
            good, junk = relevance.of(query.identities[number], query.cameras[number])
            other = np.ones(len(row), bool)
            other[good] = other[junk] = other[relevance.always_junk] = False
            yield row[other], row[good]
            number += 1

"""Find the threshold above which two images count as one person, and how often that is wrong.

Pairs of a query and a gallery image are of two kinds, by the rules of `reid.metrics`: genuine, of
one person in two cameras, and impostor, of two people (a distractor is another person); pairs with
junk are left out. At a threshold, a query's false-match rate is the fraction of its impostor pairs
that reach it, its true-match rate that of its genuine ones (terms of ISO/IEC 19795-1); rates are
means over the queries that have such pairs.
"""

from pathlib import Path

import numpy as np
from scipy import sparse

from reid.errors import UserError
from reid.files import check_types, check_writable, demand, is_a, read_json, sha256, write_json
from reid.intervals import DRAWS, SEED, bca, mean_intervals
from reid.mat import EvalSets, load_mat
from reid.metrics import JUNK_IDENTITY, Relevance, similarity_blocks
from reid.provenance import provenance

FILE = "threshold.json"  # in the run folder
BINS = 200_000  # bins of similarities from -1 to 1: a threshold is exact to 1e-5
STEPS = 200  # steps of the stored curves from -1 to 1: a rate every 0.01
KNOWN_PEOPLE = "of people that the network was trained on: it confuses others more often"
FEWEST = 10  # impostor pairs that must reach a threshold for its rate to mean something


def calibrate(mat: str | Path, rate: float) -> None:
    """Find the threshold at a false-match rate on the pairs of a .mat file; store it in the run.

    Prints the rates at it. Raises UserError where another program wrote the file, where its run is
    gone, or where it has too few pairs.
    """
    sets = load_mat(mat)
    path = run_weights(mat, sets.source).parent / FILE
    check_writable(path)
    steps = rates_by_step(sets.query, sets.gallery)
    threshold = threshold_at(rate, steps)
    rates = rates_at(threshold, sets.query, sets.gallery)
    print(rates_line(rates))
    split = sets.source.get("split")
    if split == "val":
        print(f"  {KNOWN_PEOPLE}")
    origin = {"mat": str(mat), "queries": split, "made_by": sets.made_by}
    content = {"asked_rate": rate, **origin, **provenance(), "curves": rate_curves(steps)}
    write_json(path, rates | content)
    print(f"{path}: search.py takes the threshold from there")


def possible_runs(mat, source):
    """Return the folders that may be the run folder of a .mat file, the likeliest first.

    Stored paths are hints: the file, or the whole project, may have been moved or copied since.
    """
    if "run" not in source:  # made of a file of weights
        return []
    own, stored = Path(mat).resolve().parent, Path(source["run"])
    folders = [own / source["run_from_mat"]] if "run_from_mat" in source else []
    folders += [own] if own.name == stored.name else []
    return [folder for folder in [*folders, stored] if folder.is_dir()]


def run_weights(mat: str | Path, source: dict | None) -> Path:
    """Return the weights file, in its run folder, that made a .mat file's features.

    source: the file's. Older ones don't say which weights: then the run's last.
    Raises UserError where it names no run, or no folder has these weights.
    """
    if not source or "run" not in source:
        raise UserError(f"{mat}: doesn't say which run made it; write it with our test.py --name")
    wanted = source.get("weights_sha256")
    for folder in possible_runs(mat, source):
        for path in sorted(folder.glob("net_*.pth"), reverse=True):
            if wanted is None or sha256(path) == wanted:
                return path
    raise UserError(
        f"{mat}: the run that made it, {source['run']}, is gone or has other weights by now; write "
        "the file again with test.py"
    )


def rates_at_stored(mat: str | Path, sets: EvalSets) -> dict | None:
    """Return `rates_at` the threshold stored in the run of a file's EvalSets; None without one."""
    for folder in possible_runs(mat, sets.source or {}):
        stored = stored_threshold(folder)
        if stored and stored["made_by"] == sets.made_by:
            return rates_at(stored["threshold"], sets.query, sets.gallery)
    return None


def stored_threshold(run: str | Path) -> dict | None:
    """Return the dict that `calibrate` stored in a run folder; None where there is none."""
    path = Path(run) / FILE
    if not path.exists():
        return None
    advice = "calibrate again"
    stored = read_json(path, advice)
    types = {"threshold": float, "false_match_rate": float, "impostors": int, "made_by": dict}
    demand(stored, path, advice, **types)
    check_types(stored, path, advice, curves=dict)  # older files have none
    for curve in stored.get("curves", {}).values():
        if (
            not is_a(curve, list)
            or len(curve) != STEPS + 1
            or not all(is_a(r, float) for r in curve)
        ):
            raise UserError(f"{path}: its curves are no lists of {STEPS + 1} numbers; {advice}")
    return stored


def rate_at(stored: dict, threshold: float, name: str = "false_match") -> float | None:
    """Return the rate of pairs that reach a threshold, from what `stored_threshold` returned.

    name: "false_match" or "true_match". Between the curve's points, a straight line is taken: where
    few image pairs of different people reach the threshold, it is a little above their rate. None
    where the rate is unknown: the file is of an older version, or there were no such pairs.
    """
    if threshold == stored["threshold"]:
        return stored.get(f"{name}_rate")
    curve = stored.get("curves", {}).get(name)
    if curve is None:
        return None
    return float(np.interp(threshold, np.linspace(-1, 1, STEPS + 1), curve))


def threshold_at(rate, steps):
    """Return the lowest similarity, in steps of 1e-5, whose false-match rate is `rate` or less.

    steps: what `rates_by_step` returned. Raises UserError where impostor pairs are too few, or too
    many of them have equal features.
    """
    reaching, total = steps["false_match"]
    if total * rate < FEWEST:
        raise UserError(
            f"--calibrate {rate:g}: too low a rate to be seen in {total:,} image pairs of "
            f"different people; {FEWEST / max(total, 1):.1g} or more can be"
        )
    allowed = rate * (1 + 1e-9)  # sums in another order differ in their last digits
    if reaching[-1] > allowed:
        raise UserError(
            f"--calibrate {rate:g}: {100 * reaching[-1]:.3g} % of image pairs of different people "
            "have equal features; is it the right run, are the labels right?"
        )
    return float((reaching > allowed).sum() / (BINS / 2) - 1)


def rates_by_step(query, gallery):
    """Return the rates of pairs that reach each similarity, in BINS steps from -1 to 1.

    A dict, for each rate: the rate at each step, zeros where there are no such pairs, and the
    number of pairs.
    """
    fractions, queries, total = np.zeros((2, BINS)), [0, 0], [0, 0]
    for impostor, good, row in pairs(query, gallery):
        for column, similarities in enumerate((row[impostor], row[good])):
            if len(similarities):
                steps = ((similarities.astype(np.float64) + 1) * (BINS / 2)).astype(np.int64)
                counts = np.bincount(steps.clip(0, BINS - 1), minlength=BINS)
                fractions[column] += counts / len(similarities)
                queries[column] += 1
                total[column] += len(similarities)
    return {
        name: (fractions[n][::-1].cumsum()[::-1] / max(queries[n], 1), total[n])
        for n, name in enumerate(("false_match", "true_match"))
    }


def rate_curves(steps):
    """Return the rates at thresholds from -1 to 1, in STEPS steps: a dict of lists.

    steps: what `rates_by_step` returned; a rate of no pairs is left out.
    """
    places = (np.arange(STEPS + 1) * (BINS // STEPS)).clip(max=BINS - 1)
    return {
        name: rates[places].round(9).tolist() for name, (rates, total) in steps.items() if total
    }


def rates_at(threshold, query, gallery):
    """Return both rates at a threshold and their 95 % intervals over other people: a dict."""
    impostors = Impostors(query.identities, gallery.identities)
    genuine, identities, counts = [], [], [0, 0]
    for number, (impostor, good, row) in enumerate(pairs(query, gallery)):
        pairs_here = np.count_nonzero(impostor)
        counts = np.add(counts, [pairs_here, len(good)])
        impostors.add(number, pairs_here, np.flatnonzero(impostor & (row >= threshold)))
        if len(good):
            genuine.append(np.mean(row[good] >= threshold))
            identities.append(query.identities[number])
    rates = {"threshold": threshold, "impostors": int(counts[0]), "genuine": int(counts[1])}
    rates |= {"false_match_rate": impostors.rate(), "false_match_interval": impostors.interval()}
    rates |= {"true_match_rate": None, "true_match_interval": None}
    if genuine:
        [rate] = mean_intervals(np.array(genuine)[:, None], np.array(identities))
        rates |= {"true_match_rate": rate.value, "true_match_interval": rate.ends()}
    return rates


class Impostors:
    """The impostor pairs that reach a threshold, counted by the two people of each.

    query, gallery: identities of all images. Each query weighs the same, as in the rates' mean.
    """

    def __init__(self, query: np.ndarray, gallery: np.ndarray):
        self.people = np.union1d(query, gallery)
        self.of_query, self.of_image = (
            np.searchsorted(self.people, identities) for identities in (query, gallery)
        )
        # Junk is nobody, and distractors are many people that nobody has told apart.
        self.fixed = np.isin(self.people, [0, JUNK_IDENTITY]) & ~np.isin(self.people, query)
        self.images = np.bincount(self.of_image, minlength=len(self.people))  # of each person
        self.images[self.people == JUNK_IDENTITY] = 0
        self.weights = np.zeros(len(self.people))  # of a pair, summed over each person's queries
        self.entries = []  # of `reaching`, some of each query

    def add(self, number: int, pairs: int, reaching: np.ndarray) -> None:
        """Count a query's number of pairs, and the gallery images that reach: indices."""
        if not pairs:
            return
        person = self.of_query[number]
        self.weights[person] += 1 / pairs
        others, counts = np.unique(self.of_image[reaching], return_counts=True)
        self.entries.append((counts / pairs, np.full(len(others), person), others))

    def rate(self) -> float | None:
        """Return the mean over queries of the fraction that reaches; None without pairs."""
        return float(self.reaching().sum() / self.total()[0]) if self.weights.any() else None

    def reaching(self) -> sparse.csr_array:
        """Return the weight of the pairs that reach, [people, people]: of a query's and another."""
        values, *places = map(np.concatenate, zip(*self.entries, strict=True))
        return sparse.coo_array((values, tuple(places)), (len(self.people),) * 2).tocsr()

    def total(self, times: np.ndarray | None = None) -> np.ndarray:
        """Return the weight of all pairs, [n], where people come `times` [n, people]; or once."""
        times = np.ones((1, len(self.people))) if times is None else times
        own = times**2 @ (self.weights * self.images)  # no pairs of different people
        return (times @ self.weights) * (times @ self.images) - own

    def interval(self) -> list[float] | None:
        """Return the 95 % interval of the rate over other people; None where no pair reaches.

        BCa over resampled people. A pair has two, and both are drawn (Owen, "The Pigeonhole
        Bootstrap", 2007): with the gallery's people kept it would be too narrow.
        """
        drawn = np.flatnonzero(~self.fixed)
        reaching = self.reaching() if self.entries else None
        if reaching is None or not reaching.nnz or len(drawn) < 3:
            return None
        times = np.ones((DRAWS, len(self.people)))
        alike = np.full(len(drawn), 1 / len(drawn))
        times[:, drawn] = np.random.default_rng(SEED).multinomial(len(drawn), alike, DRAWS)
        total = self.total()
        draws = ((reaching.T @ times.T).T * times).sum(axis=1) / self.total(times).clip(1e-12)
        images, weights = self.images, self.weights
        with_one = reaching.sum(axis=0) + reaching.sum(axis=1)
        pairs_with_one = weights * (images.sum() - images) + images * (weights.sum() - weights)
        left = (reaching.sum() - with_one) / (total - pairs_with_one).clip(1e-12)
        low, high = bca(draws[:, None], reaching.sum() / total, left[drawn, None])
        return np.clip([low[0], high[0]], 0, 1).tolist()


def rates_line(rates: dict) -> str:
    """Return the line that says what `rates_at` returned."""
    return (
        f"threshold {rates['threshold']:.4f}: "
        f"false-match rate {in_percent(rates, 'false_match')} of {rates['impostors']:,} pairs, "
        f"true-match rate {in_percent(rates, 'true_match')} of {rates['genuine']:,} "
        "(95 % intervals over other people)"
    )


def in_percent(rates, name):
    value, bounds = rates[f"{name}_rate"], rates[f"{name}_interval"]
    if value is None:
        return "unknown"
    text = f"{100 * value:.3g} %"
    return text if bounds is None else f"{text} ({100 * bounds[0]:.3g} to {100 * bounds[1]:.3g})"


def pairs(query, gallery):
    """Yield each query's impostor pairs [Ng] bool, genuine ones (indices) and similarities [Ng]."""
    relevance = Relevance(gallery)
    rows = (row for block in similarity_blocks(query, gallery) for row in block)
    for row, identity, camera in zip(rows, query.identities, query.cameras, strict=True):
        good, junk = relevance.of(identity, camera)
        impostor = np.full(len(row), identity != JUNK_IDENTITY)
        impostor[good] = impostor[junk] = impostor[relevance.always_junk] = False
        yield impostor, good, row

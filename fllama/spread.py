"""How sure a comparison is: intervals, many pairs at once, repeats that are needed, what the spread is made of."""

import math

import numpy as np
from scipy import stats

LEVEL, POWER = 0.05, 0.8  # two-sided; Cohen 1988 (Statistical Power Analysis for the Behavioral Sciences)
LEAST_PAIRS = 3
MOST_PAIRS = 2**20  # with more, nobody would ask
LEAST_ROWS = 6  # of fewer, not even an exact test of their signs can reach 5%: 2 x 0.5^5 is 6%
RESAMPLES = 9999
EQUAL = 1e-9  # differences that vary by less of their mean have no spread, but for rounding


def mean(values):
    """Return the mean of those that are not None; None if there is none."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def least(values):
    return min((value for value in values if value is not None), default=None)


def interval_of_mean(values):
    """Return (mean, low, high): the 95% interval of a mean by Student's t; None for fewer than 3 values."""
    if len(values) < LEAST_PAIRS:
        return None
    mean, error = float(np.mean(values)), float(stats.sem(values))
    half = float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1)) * error
    return mean, mean - half, mean + half


def paired_test(differences, level=LEVEL):
    """Return what the differences of some pairs say, by Student's t; None for fewer than 3 pairs.

    `mean`, `low` and `high` (95%), the two-sided `p`, and `needed_repeats`, how many pairs it would take in all to tell
    such a difference from 0 at `level`. Equal differences say nothing of their spread, so t would be infinite: p is
    that of the exact sign test, 2^(1 - n) for n pairs (Dixon and Mood 1946), and needed is what brings it to `level`.
    """
    interval = interval_of_mean(differences)
    if interval is None:
        return None
    mean, low, high = interval
    deviation = float(np.std(differences, ddof=1))
    if not mean:
        p, needed = 1.0, None
    elif deviation <= EQUAL * abs(mean):
        p, needed = 2.0 ** (1 - len(differences)), math.ceil(1 - math.log2(level))
    else:
        t = mean / deviation * math.sqrt(len(differences))
        p = float(2 * stats.t.sf(abs(t), len(differences) - 1))
        needed = needed_repeats(mean, deviation, level)
    return {"mean": mean, "low": low, "high": high, "p": p, "needed_repeats": needed}


def needed_repeats(mean, deviation, level=LEVEL):
    """Return the least number of pairs whose paired t-test finds a difference with power 0.8 at `level`, two-sided.

    `mean` and `deviation` are those of the differences. With n pairs, the power is 1 - F(t) + F(-t): t is the critical
    value of Student's t with n - 1 degrees of freedom, and F the noncentral t distribution with the noncentrality
    sqrt(n) mean / deviation (Cohen 1988, chapter 2). None where it cannot be told: without a difference or a spread.
    """
    if not mean or not deviation:
        return None
    enough = 2
    while power_of_pairs(enough, mean / deviation, level) < POWER:
        enough *= 2
        if enough > MOST_PAIRS:
            return None
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if power_of_pairs(middle, mean / deviation, level) < POWER:
            too_few = middle
        else:
            enough = middle
    return enough


def power_of_pairs(pairs, effect, level=LEVEL):
    """Return the power of a paired t-test at `level` for a difference of `effect` standard deviations."""
    noncentrality = math.sqrt(pairs) * abs(effect)
    critical = stats.t.ppf(1 - level / 2, pairs - 1)
    if noncentrality > 10 * critical:  # beyond what the distribution is computed for, and certain
        return 1.0
    power = stats.nct.sf(critical, pairs - 1, noncentrality)
    if noncentrality < 5:  # beyond, the other tail is below 1e-6, and scipy may give nan for it
        power += stats.nct.cdf(-critical, pairs - 1, noncentrality)
    return float(power)


def holm(p_values):
    """Return p-values corrected for being many, in their order. Holm 1979 (Scandinavian Journal of Statistics 6).

    The smallest of m counts m times, the next m - 1 times and so on, none less than the one before it, at most 1.
    """
    adjusted, largest = [None] * len(p_values), 0.0
    for place, number in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, (len(p_values) - place) * p_values[number])
        adjusted[number] = min(1.0, largest)
    return adjusted


def variance_shares(scores):
    """Return which share of the spread of `scores`, an array (methods, splits, seeds), each factor explains.

    Eta squared of a balanced design with one run y[m, r, s] a cell: sums of squares as shares of their total (Fisher
    1925, Statistical Methods for Research Workers). They describe these runs, and are no estimates of variance
    components. A training seed is nested in its split: the same number does other things on other rows. Of the
    N = M R S runs, a dot is a mean,

        method       R S sum_m (y[m..] - y[...])^2
        split        M S sum_r (y[.r.] - y[...])^2
        seed           M sum_rs (y[.rs] - y[.r.])^2
        interaction    S sum_mr (y[mr.] - y[m..] - y[.r.] + y[...])^2, of method and split: another split, another order
        residual     what is left of sum_mrs (y[mrs] - y[...])^2

    each divided by the last sum, so that they add up to 1. A share is above 0 also where a factor does nothing: among
    runs that differ by chance alone, (M - 1) / (N - 1) is expected of the method, and of the others their degrees of
    freedom divided by N - 1. What cannot be told apart is None: with one seed, `seed` (which changes with the split and
    is in its share) and `interaction` (in the residual); with one split or one method, that and the interaction. None
    in place of all if there is no spread, or nothing but one factor.
    """
    methods, splits, seeds = scores.shape
    total = ((scores - scores.mean()) ** 2).sum()
    if not total > 0 or scores.size == max(scores.shape):
        return None
    of_method = scores.mean(axis=(1, 2)) - scores.mean()
    of_split = scores.mean(axis=(0, 2)) - scores.mean()
    of_seed = scores.mean(axis=0) - scores.mean(axis=(0, 2))[:, None]
    of_both = scores.mean(axis=2) - scores.mean() - of_method[:, None] - of_split
    sums = {
        "split": methods * seeds * (of_split**2).sum() if splits > 1 else None,
        "seed": methods * (of_seed**2).sum() if seeds > 1 else None,
        "method": splits * seeds * (of_method**2).sum() if methods > 1 else None,
        "interaction": seeds * (of_both**2).sum() if min(scores.shape) > 1 else None,
    }
    shares = {name: None if value is None else float(value / total) for name, value in sums.items()}
    known = sum(share for share in shares.values() if share is not None)
    return shares | {"residual": max(0.0, 1 - known)}


def gain_over_rows(differences, right_or_wrong=True):
    """Return the mean of the differences of a client's rows, {mean, low, high, harmed}, with its 95% interval.

    By the bootstrap over rows, percentiles of 9,999 draws (Efron and Tibshirani 1993, An Introduction to the
    Bootstrap, chapter 13). `harmed` says that the interval is below 0. It is too narrow where few rows differ; so if
    the scores of rows are right or wrong, more must also be lost than won, at 5%, by the exact test of McNemar 1947
    (Psychometrika 12). Fewer than 6 rows have neither.
    """
    values = np.asarray(differences, dtype=float)
    gain = {"mean": float(values.mean()), "low": None, "high": None, "harmed": None}
    if len(values) < LEAST_ROWS:
        return gain
    rng = np.random.default_rng(0)
    drawn = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=1000, method="percentile", rng=rng)
    low, high = (float(end) for end in drawn.confidence_interval)
    harmed = high < 0
    if harmed and right_or_wrong:
        lost, won = int((values < 0).sum()), int((values > 0).sum())
        harmed = bool(stats.binomtest(lost, lost + won, 0.5).pvalue < LEVEL)
    return gain | {"low": low, "high": high, "harmed": harmed}

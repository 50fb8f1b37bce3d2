"""Intervals, needed repeats, Holm, variance shares and gains: by hand, and against statsmodels."""

import itertools
import math

import numpy as np
import pandas
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from fllama import spread


def test_paired_test_by_hand():
    """1, 2, 3: mean 2, deviation 1, t(2) = 4.303, so 2 +- 2.484; p = 1 - t / sqrt(2 + t^2) with t = 2 sqrt(3)."""
    found = spread.paired_test([1.0, 2.0, 3.0])
    assert found["mean"] == 2 and found["high"] == pytest.approx(2 + 4.303 / 3**0.5, abs=1e-3)
    assert found["low"] == pytest.approx(2 - 4.303 / 3**0.5, abs=1e-3)
    t = 2 * 3**0.5
    assert found["p"] == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert spread.paired_test([1.0, 2.0]) is None
    assert spread.paired_test([0.0] * 3)["p"] == 1


def test_equal_differences_are_tested_by_their_signs():
    """Three of one sign come by chance in 2 of 8 cases; 2 of 2^6 are the first below 5%, 2 of 2^9 below 0.5%."""
    for differences in ([5.0] * 3, [0.1 + 0.2, 0.3, 0.3]):
        same = spread.paired_test(differences)
        assert (same["p"], same["needed_repeats"]) == (0.25, 6)
    assert spread.paired_test([-5.0] * 6)["p"] == 1 / 32
    assert spread.paired_test([5.0] * 3, 0.005)["needed_repeats"] == 9


@pytest.mark.parametrize("effect", [2.0, 1.0, 0.5, 0.2, 0.1, -0.2])
def test_needed_repeats(effect):
    """One pair fewer has less power than 0.8. Cohen's table for d = 0.2 says 199, for 0.5 34."""
    needed = spread.needed_repeats(3 * effect, 3.0)
    assert needed == math.ceil(TTestPower().solve_power(effect_size=abs(effect), alpha=0.05, power=0.8))
    assert needed == {0.2: 199, 0.5: 34}.get(abs(effect), needed)
    for pairs in (needed, 7):
        power = TTestPower().power(abs(effect), pairs, 0.05)
        assert spread.power_of_pairs(pairs, effect) == pytest.approx(power, abs=1e-6)


@pytest.mark.parametrize("effect", [3.0, 1.0, 0.2])
def test_needed_repeats_of_many_pairs(effect):
    """Of 28 pairs of arms: at 5% / 28, which is enough for Holm, more are needed. Power against 100,000 draws."""
    needed, level = spread.needed_repeats(effect, 1.0, 0.05 / 28), 0.05 / 28
    assert needed > spread.needed_repeats(effect, 1.0)
    assert spread.power_of_pairs(needed, effect, level) >= 0.8 > spread.power_of_pairs(needed - 1, effect, level)
    rng, critical = np.random.default_rng(0), stats.t.ppf(1 - level / 2, needed - 1)
    means = effect + rng.normal(size=100_000) / math.sqrt(needed)
    deviations = np.sqrt(rng.chisquare(needed - 1, size=100_000) / (needed - 1))
    found = np.mean(np.abs(means / deviations) * math.sqrt(needed) > critical)
    assert spread.power_of_pairs(needed, effect, level) == pytest.approx(found, abs=0.01)


def test_needed_repeats_that_cannot_be_told():
    assert spread.needed_repeats(0.0, 1.0) is None and spread.needed_repeats(1.0, 0.0) is None
    assert spread.needed_repeats(1e-9, 1.0) is None  # more than anybody would ask for
    assert spread.needed_repeats(1e9, 1.0) == 2


def test_holm_by_hand():
    """0.01 x 4, 0.02 x 3, 0.03 x 2, 0.03 would be less than the one before; nothing is above 1."""
    assert spread.holm([0.03, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert spread.holm([0.6, 0.7]) == [1, 1] and spread.holm([]) == []
    values = np.random.default_rng(1).uniform(0, 0.2, 10)
    assert spread.holm(values) == pytest.approx(multipletests(values, method="holm")[1])


def test_variance_shares_by_hand():
    """Of 1 3 and 2 8: mean 3.5, methods 2 and 5, splits 1.5 and 5.5; sums of squares 9, 16, 4 left, 29 in all."""
    table = np.array([[1.0, 3.0], [2.0, 8.0]])
    shares = spread.variance_shares(table[:, :, None])
    assert shares == pytest.approx(
        {"split": 16 / 29, "seed": None, "method": 9 / 29, "interaction": None, "residual": 4 / 29}
    )
    # with a second seed that adds 2 everywhere, all of these count twice, and the seed has 8 x 1
    shares = spread.variance_shares(np.stack([table, table + 2], axis=2))
    expected = {"split": 32 / 66, "seed": 8 / 66, "method": 18 / 66, "interaction": 8 / 66, "residual": 0}
    assert shares == pytest.approx(expected, abs=1e-12)
    # a second seed that adds 2 on one split and takes 2 on the other: nothing in the mean, and as much in its split
    shares = spread.variance_shares(np.stack([table, table + [2, -2]], axis=2))
    assert shares["seed"] == pytest.approx(8 / (8 + 18 + 8 + 2 * 2 * 2 * 1)) and shares["residual"] == pytest.approx(0)
    assert spread.variance_shares(np.ones((2, 3, 2))) is None
    assert spread.variance_shares(np.arange(3.0).reshape(1, 3, 1)) is None  # nothing but one factor


def test_shares_of_methods_that_change_nothing():
    """Of runs that differ by chance alone, the method's mean is (M - 1) / (N - 1), a split's (R - 1) / (N - 1)."""
    rng, found = np.random.default_rng(0), []
    for _ in range(2000):
        shares = spread.variance_shares(rng.normal(size=(5, 3, 2)))
        found.append([shares["method"], shares["split"], shares["seed"], shares["interaction"]])
    assert np.mean(found, axis=0) == pytest.approx([4 / 29, 2 / 29, 3 / 29, 8 / 29], abs=0.01)


def test_variance_shares_are_those_of_an_anova():
    scores = np.random.default_rng(0).normal(size=(3, 4, 2)) + np.arange(4)[:, None]
    rows = []
    for m, r, s in itertools.product(range(3), range(4), range(2)):
        rows.append({"method": m, "split": r, "seed": s, "score": scores[m, r, s]})
    fitted = ols("score ~ C(split) + C(split):C(seed) + C(method) + C(method):C(split)", pandas.DataFrame(rows)).fit()
    squares = anova_lm(fitted)["sum_sq"]
    squares = squares[["C(split)", "C(split):C(seed)", "C(method)", "C(method):C(split)", "Residual"]]
    shares = spread.variance_shares(scores)
    assert list(shares) == ["split", "seed", "method", "interaction", "residual"]
    assert list(shares.values()) == pytest.approx(list(squares / squares.sum()))
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "shape, hidden",
    [
        ((3, 4, 1), {"seed", "interaction"}),
        ((3, 1, 4), {"split", "interaction"}),
        ((1, 3, 2), {"method", "interaction"}),
        ((2, 2, 2), set()),
    ],
)
def test_what_cannot_be_told_apart_is_null(shape, hidden):
    shares = spread.variance_shares(np.random.default_rng(0).normal(size=shape))
    assert {name for name, share in shares.items() if share is None} == hidden
    assert sum(share for share in shares.values() if share is not None) == pytest.approx(1)


def test_gain_over_rows():
    """10 of 40 rows lost: mean -25, deviation 43.3, so the interval is about 1.96 x 6.85 to either side."""
    gain = spread.gain_over_rows([-100.0] * 10 + [0.0] * 30)
    assert gain["mean"] == -25 and gain["harmed"]
    assert gain["low"] == pytest.approx(-25 - 13.4, abs=2) and gain["high"] == pytest.approx(-25 + 13.4, abs=2)
    assert spread.gain_over_rows([0.0] * 20) == {"mean": 0, "low": 0, "high": 0, "harmed": False}
    assert spread.gain_over_rows([-100.0] * 5) == {"mean": -100, "low": None, "high": None, "harmed": None}


def test_few_rows_do_not_harm():
    """5 of 48 rows lost and none won are 6.2% by McNemar, 6 are 3.1%; 9 lost and 2 won 6.5%. The bootstrap is lax."""
    for lost, won, harmed in ((5, 0, False), (6, 0, True), (9, 2, False), (12, 2, True)):
        differences = [-100.0] * lost + [100.0] * won + [0.0] * (48 - lost - won)
        gain = spread.gain_over_rows(differences)
        assert gain["high"] < 0 and gain["harmed"] is harmed, (lost, won)
        assert spread.gain_over_rows(differences, right_or_wrong=False)["harmed"] is True


def test_interval_of_a_gain_holds_the_truth():
    """Of 200 clients without a gain, whose rows are won and lost at random, about 5% have intervals without 0."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        gain = spread.gain_over_rows(rng.choice([-100, 0, 100], size=48, p=[0.1, 0.8, 0.1]))
        missed += not gain["low"] <= 0 <= gain["high"]
    assert missed <= 20

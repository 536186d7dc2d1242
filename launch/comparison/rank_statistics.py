"""Rank statistics of two samples of runs: a test of whether they differ, and an interval of their ratio.

Both are scipy's where scipy has them. It is imported at the first test, for that takes half a second.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

ALPHA = 0.05
_Z = statistics.NormalDist().inv_cdf(1 - ALPHA / 2)
_EXACT_COST = 1e8  # additions, about 0.1 s: reached at 60 + 60 runs; the normal approximation is good to 2 % of p there


def _subsets_by_sum(ranks: np.ndarray, size: int) -> np.ndarray:
    """[sum + 1] float64: how many of the subsets of `size` of the integer `ranks` have each sum; exact below 2**53."""
    ways = np.zeros((size + 1, int(np.sort(ranks)[-size:].sum()) + 1))
    ways[0, 0] = 1
    for rank in ranks:
        ways[1:, rank:] += ways[:-1, :-rank]
    return ways[size]


def is_counted(n_a: int, n_b: int) -> bool:
    """Whether p comes from all splits of the pooled runs, not from the normal approximation."""
    n, m = n_a + n_b, min(n_a, n_b)
    return n * m * m * (2 * n - m) <= _EXACT_COST


def rank_test(a: Sequence[float], b: Sequence[float]) -> tuple[float, int]:
    """(two-sided p, 1 where b ranks above a, -1 below, 0 neither) of the test of Mann and Whitney (1947).

    p is the share of splits of the pooled values whose rank sum is at least as far from its mean, tied values sharing
    their mean rank. Where the splits are too many to count, p is that of a normal distribution with the rank sum's
    own variance over splits.
    """
    from scipy import stats

    counted, is_tied = is_counted(len(a), len(b)), len({*a, *b}) < len(a) + len(b)
    found = stats.mannwhitneyu(b, a, method="exact" if counted and not is_tied else "asymptotic")
    above, p = found.statistic - len(a) * len(b) / 2, found.pvalue
    if counted and is_tied:
        # Counted here: scipy's exact test is for samples without ties, and its permutation test goes through the splits
        # one by one, of which 10 + 10 runs have 184,756 and 20 + 20 have 10**11.
        ranks = np.rint(2 * stats.rankdata([*a, *b])).astype(int)  # twice the mean rank, which may end in a half
        size = min(len(a), len(b))
        ways, mean = _subsets_by_sum(ranks, size), size * (len(ranks) + 1)
        p = ways[np.abs(np.arange(len(ways)) - mean) >= abs(2 * above)].sum() / ways.sum()
    return min(1.0, float(p)), int(np.sign(above))


def runs_needed(n_a: int, n_b: int) -> tuple[int, int]:
    """The runs of a and b with which the test can come below 5 %: these, or the fewer of the two raised."""
    k = 1
    while 2 / math.comb(max(n_a, k) + max(n_b, k), max(n_a, k)) > ALPHA:
        k += 1
    return max(n_a, k), max(n_b, k)


def ratio_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The interval of at least 95 % of the ratio b/a of positive values; all pairwise ratios' where runs are too few.

    It goes from the k-th smallest to the k-th largest pairwise ratio (Hodges and Lehmann, 1963): k is the most for
    which 2 P(U < k) <= 5 %, U being the Mann-Whitney statistic of samples without a difference. scipy has the p of a
    pair of samples and not the distribution of U, which is counted here.
    """
    with np.errstate(over="ignore", under="ignore"):
        ratios = np.sort(np.divide.outer(np.asarray(b, np.float64), np.asarray(a, np.float64)), axis=None)
    n, m = len(a) + len(b), min(len(a), len(b))
    if is_counted(len(a), len(b)):
        ways = _subsets_by_sum(np.arange(1, n + 1), m)[m * (m + 1) // 2 :]
        k = int((2 * np.cumsum(ways) <= ALPHA * ways.sum()).sum())
    else:
        k = int(len(ratios) / 2 - _Z * math.sqrt(len(ratios) * (n + 1) / 12))
    return float(ratios[max(k, 1) - 1]), float(ratios[-max(k, 1)])

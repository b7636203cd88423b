"""What a comparison may claim: intervals of means, and which of two methods is better, by the paired bootstrap.

    sample = as many test examples as there are, drawn with replacement, the same ones for every method (Efron 1979);
             to each method's mean is added what other seeds would move it by, t * d / sqrt(its seeds)
    d      = the deviation of its seeds' scores or, if that is larger or there is one seed alone, the common one: the
             root of the mean of all methods' variances
    t      = drawn from Student's distribution; its degrees of freedom are the seeds beyond the first, of all methods
    p      = twice the share of samples in which the difference of two methods' means has the other sign, or is 0

Three seeds are few. Drawn with replacement, as examples are, they would be taken for all there is: of eleven methods
that are equal, two would be told apart in nine comparisons of ten. With the above it is one in twenty at most, and
with two seeds, some methods varying far more than others, one in ten (a simulation in
tests/runs/test_significance.py). All pairs of one dataset are one family of tests: Holm (1979)
multiplies the smallest p of m by m, the next by m - 1, and so on. Where every method has one seed, nothing is known of
what another would have given: then all is said of these runs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

import numpy as np

SAMPLES, LEVEL = 10_000, 0.05
_AT_ONCE = 200  # samples: what they weigh is kept for all examples

Headline = Callable[[np.ndarray, int], np.ndarray]


def resampled(each: Mapping[str, Sequence[np.ndarray]], headline_of: Headline, samples: int = SAMPLES,
              seed: int = 0) -> dict[str, np.ndarray]:
    """Each method's mean over seeds, on every sample of the examples, moved as other seeds would: (samples,) each.

    Args:
        each: by method, for each of its seeds what the task counted of each example, (N, S); N and S are all the same.
        headline_of: (sums (..., S), N) -> headline (...): `Task.headline_of`.
    """
    rng = np.random.default_rng(seed)
    columns = np.stack([counts for seeds in each.values() for counts in seeds], axis=1)            # (N, runs, S)
    N, runs, S = columns.shape
    flat, found = columns.reshape(N, runs * S).astype(np.float64), []
    for start in range(0, samples, _AT_ONCE):
        rows = min(_AT_ONCE, samples - start)
        drawn = rng.integers(0, N, (rows, N))
        weights = np.stack([np.bincount(row, minlength=N) for row in drawn]).astype(np.float64)    # (rows, N)
        found.append(headline_of((weights @ flat).reshape(rows, runs, S), N))                      # (rows, runs)
    scores, result, first = np.concatenate(found), {}, 0                                           # (samples, runs)
    deviations, freedom = _deviations({method: [float(headline_of(counts.sum(axis=0), N)) for counts in seeds]
                                       for method, seeds in each.items()})
    for method, seeds in each.items():
        result[method] = scores[:, first:first + len(seeds)].mean(axis=1)                          # (samples,)
        if freedom:
            result[method] += rng.standard_t(freedom, samples) * deviations[method] / len(seeds) ** 0.5
        first += len(seeds)
    return result


def _deviations(scores: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], int]:
    """d of each method, and t's degrees of freedom; these are 0 where no method has several seeds."""
    own = {method: stdev(found) for method, found in scores.items() if len(found) > 1}
    common = fmean(deviation**2 for deviation in own.values()) ** 0.5 if own else 0.0
    return ({method: max(own.get(method, 0.0), common) for method in scores},
            sum(len(found) - 1 for found in scores.values()))


def interval(values: np.ndarray) -> list[float]:
    """What holds 95 % of the samples: [2.5th percentile, 97.5th percentile]."""
    return [round(float(bound), 6) for bound in np.percentile(values, (50 * LEVEL, 100 - 50 * LEVEL))]


def compared(means: Mapping[str, float], samples: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Every pair of methods.

    Args:
        means: of the headline, by method; higher is better.
        samples: what `resampled` gave.

    Returns:
        {"a", "b", "difference": a's mean less b's, "interval_95", "p", "p_holm", "significant"} each, smallest p first.
    """
    found = []
    for a, b in combinations(means, 2):
        gap = samples[a] - samples[b]                                                              # (samples,)
        other = min((gap <= 0).sum(), (gap >= 0).sum())
        found.append({"a": a, "b": b, "difference": round(means[a] - means[b], 6), "interval_95": interval(gap),
                      "p": round(min(1.0, 2 * (1 + int(other)) / (1 + len(gap))), 6)})
    found.sort(key=lambda test: test["p"])
    for test, p in zip(found, holm([test["p"] for test in found])):
        test |= {"p_holm": round(p, 6), "significant": p < LEVEL}
    return found


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order, which is ascending."""
    adjusted, highest = [], 0.0
    for number, value in enumerate(p):
        highest = max(highest, min(1.0, (len(p) - number) * value))
        adjusted.append(highest)
    return adjusted


def ranks(methods: Sequence[str], found: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What may be said of each method's place.

    Returns:
        By method {"better_than", "worse_than": methods, significantly; "rank": [best, worst] that these leave open}.
        The rank is one number, as [3, 3], where each other method is significantly better or worse.
    """
    result = {method: {"better_than": [], "worse_than": []} for method in methods}
    for test in found:
        if test["significant"]:
            better, worse = (test["a"], test["b"]) if test["difference"] > 0 else (test["b"], test["a"])
            result[better]["better_than"].append(worse)
            result[worse]["worse_than"].append(better)
    for place in result.values():
        place["rank"] = [1 + len(place["worse_than"]), len(methods) - len(place["better_than"])]
    return result

"""What a comparison may claim: intervals of means, and which of two methods is better, by the paired bootstrap.

    sample = as many test examples as there are, drawn with replacement, the same ones for every method (Efron 1979);
             and of each method as many seeds as it has, drawn with replacement
    p      = twice the share of samples in which the difference of two methods' means has the other sign, or is 0

All pairs of one dataset are one family of tests: Holm (1979) multiplies the smallest p of m by m, the next by m - 1,
and so on, so that with 95 % probability none of the differences called significant is chance. With one seed, nothing
is known of what another seed would have given: the interval is of the test examples alone. Three seeds are few, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

SAMPLES, LEVEL = 10_000, 0.05
_AT_ONCE = 200  # samples: what they weigh is kept for all examples

Headline = Callable[[np.ndarray, int], np.ndarray]


def resampled(each: Mapping[str, Sequence[np.ndarray]], headline_of: Headline, samples: int = SAMPLES,
              seed: int = 0) -> dict[str, np.ndarray]:
    """Each method's mean over seeds, on every sample of the examples and of its seeds: (samples,) each.

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
    for method, seeds in each.items():
        own = scores[:, first:first + len(seeds)]                                                  # (samples, seeds)
        drawn = rng.integers(0, len(seeds), own.shape)
        result[method] = np.take_along_axis(own, drawn, axis=1).mean(axis=1)                       # (samples,)
        first += len(seeds)
    return result


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

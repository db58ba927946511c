"""Means, intervals and paired tests. Pure functions over floats; nothing of ours is imported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

SURE = 0.05  # a corrected p value below this is called a difference
_TINY, _CLOSE, _MAX_TERMS = 1e-300, 1e-15, 1000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds and its 95 % interval; `low` and `high` are None where one seed gives no interval.

    `p` is the two-sided p value of "the mean is 0": only paired differences have one, and only where they vary.
    """

    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), 0 <= x <= 1, a and b > 0; about 14 digits.

    Source: the continued fraction of DLMF 8.17.22, evaluated by Lentz's method; the symmetry 8.17.4 keeps it short.
    """
    if not (0 <= x <= 1 and a > 0 and b > 0):
        raise ValueError(f"incomplete_beta({a}, {b}, {x}): a and b must be positive and x between 0 and 1")
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a
    c, d = 1.0, 1 / _apart(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, _MAX_TERMS):
        change = 1.0
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / _apart(1 + term * d), _apart(1 + term / c)
            change *= c * d
        fraction *= change
        if abs(change - 1) < _CLOSE:
            break
    return front * fraction


def _apart(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def t_two_sided(t: float, degrees: float) -> float:
    """P(|T| >= |t|) of Student's t with `degrees` > 0 degrees of freedom. Source: DLMF 8.17 with x = v / (v + t^2)."""
    return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def t_quantile(probability: float, degrees: float) -> float:
    """The t below which Student's t falls with `probability`, 0.5 <= probability < 1, by bisection."""
    if not 0.5 <= probability < 1:
        raise ValueError(f"t_quantile of {probability}: allowed are 0.5 to below 1")
    tail = 2 * (1 - probability)
    low, high = 0.0, 1.0
    while t_two_sided(high, degrees) > tail:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if t_two_sided(middle, degrees) > tail:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean with its t interval: mean +- t_{n-1} * s / sqrt(n), s the unbiased standard deviation.

    Raises ValueError where there are no values.
    """
    if not values:
        raise ValueError("no values to estimate a mean from")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(1, mean)
    half = t_quantile((1 + level) / 2, n - 1) * _standard_error(values, mean)
    return Estimate(n, mean, mean - half, mean + half)


def paired(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """The mean difference `values[i] - reference[i]` of the same seeds, its interval and the p value of the paired t test.

    Differences that are all equal have no spread to test with: p is 1 where they are 0, and None elsewhere.
    Raises ValueError for sequences of different length.
    """
    differences = [v - r for v, r in zip(values, reference, strict=True)]
    found = estimate(differences)
    if found.n == 1:
        return found
    error = _standard_error(differences, found.mean)
    if error <= 1e-12 * max(1.0, abs(found.mean)):
        p = 1.0 if abs(found.mean) <= 1e-12 else None
    else:
        p = t_two_sided(found.mean / error, found.n - 1)
    return dataclasses.replace(found, p=p)


def _standard_error(values: Sequence[float], mean: float) -> float:
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for the number of tests, in the given order; None stays None and is not counted.

    The k-th smallest of m is multiplied by m - k + 1, made no smaller than the one before, and cut at 1.
    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979).
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for k, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - k) * p))
        corrected[i] = largest
    return corrected


def p_text(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.3f}"

"""How often the report's intervals hold the truth: coverage by simulation.

`python -m analysis.coverage` draws studies of six variants over n seeds with additive block and
variant effects, and counts how often the 95 % intervals of one difference hold its true value:
the paired Student-t interval and the pooled one. Noise is normal, skewed (exponential), or of
unequal variance, where the pooled interval is asked about two quiet variants among loud ones and
about two loud ones among quiet: it has one residual variance for all.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from analysis.stats import layout, paired, pooled_interval

VARIANTS, TRUTH = 6, 0.2  # the second variant is truly worse than the first by TRUTH
SCALES = {
    "normal": np.ones(VARIANTS),
    "skewed": np.ones(VARIANTS),
    "quiet among loud": np.array([0.5, 0.5, 1.5, 1.5, 1.5, 1.5]),
    "loud among quiet": np.array([1.5, 1.5, 0.5, 0.5, 0.5, 0.5]),
}


def draw(noise: str, n: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """One study's values (n blocks, VARIANTS)."""
    shape = (n, VARIANTS)
    skewed = noise == "skewed"
    residual = generator.exponential(size=shape) - 1 if skewed else generator.normal(size=shape)
    variants = np.r_[0, TRUTH, np.zeros(VARIANTS - 2)]
    return generator.normal(size=(n, 1)) + variants + SCALES[noise] * residual


def coverage(noise: str, n: int, studies: int, seed: int = 0) -> tuple[float, float]:
    """Shares of simulated studies whose paired and pooled interval hold the true difference."""
    generator, held = np.random.default_rng(seed), np.zeros(2)
    for _ in range(studies):
        values = draw(noise, n, generator)
        effect = paired(values[:, 1] - values[:, 0])
        pooled = pooled_interval(effect.effect, n, layout(values))
        for i, (low, high) in enumerate(((effect.low, effect.high), pooled)):
            held[i] += low <= TRUTH <= high
    return tuple(held / studies)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser("python -m analysis.coverage", description=__doc__)
    parser.add_argument("--studies", type=int, default=4000, help="simulated studies a cell")
    studies = parser.parse_args().studies
    rows = [[noise, n, *coverage(noise, n, studies)] for noise in SCALES for n in (3, 6, 10)]
    print(tabulate(rows, ["noise", "n", "paired", "pooled"], floatfmt=".3f"))
    error = (0.95 * 0.05 / studies) ** 0.5
    print(f"{studies} studies a row: the standard error of .950 is {error:.4f}")


if __name__ == "__main__":
    main()

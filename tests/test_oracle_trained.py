"""End to end: a network trained on fresh draws lands on the fixed point that the oracle computes
for the same loss, for CT, CD, averaged draws and a robust distance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from study import data, oracle
from study.models import finished, fixed_point, level_range
from study.resolve import load
from study.store import Store
from study.train import set_up, train

CPU = torch.device("cpu")
STUDY = """\
base:
  data: {kind: mixture, means: [[-1.0], [1.0]], std: 0.3}
  network: {kind: mlp, width: 64, depth: 3}
  budget: {images: 512000}
  batch: 256
  discretization: {kind: fixed, N: 6}
  law: uniform_grid
  distance: l2
  weights_ema: [0.1]
variants:
  network: {SETTING}
  fixed: {SETTING, objective: fixed_point}
measure: {at: [1.0], pushforward: {}}
"""
SETTINGS = {
    "ct": "score: single_sample",
    "cd": "score: analytic",
    "four draws averaged": "score: {kind: posterior_k, k: 4}",
    "robust": "distance: {kind: pseudo_huber, c0: 0.3}",
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_trained_network_lands_on_the_fixed_point(case: str, tmp_path: Path) -> None:
    file = tmp_path / "land.yaml"
    file.write_text(STUDY.replace("SETTING", SETTINGS[case]))
    study = load(file)
    network, fixed = study.runs
    store = Store(tmp_path, study)
    folder = store.folders[network.id]
    folder.file("snapshots").mkdir(parents=True)
    set_up()
    factors = network.recipe.factors
    dataset = data.load(factors.data)
    arguments = study.unique, store.folders.__getitem__, dataset, CPU
    assert train(network, *arguments, lambda: False, {})

    sigma = level_range(factors, dataset)
    x = oracle.quantiles(sigma, 4000).float()[:, None]
    T = torch.full((len(x),), sigma.max)
    with torch.no_grad():
        trained = finished(factors, folder, dataset, CPU, factors.batch)(x, T)
    exact = fixed_point(fixed.recipe.factors, dataset)(x, T)
    assert (trained - exact).square().mean().sqrt() < 0.05  # the data's std is 1.04
    # the fixed points of the four differ by far more, and from the true map
    truth = dataset.density.ode_map(x, sigma.max, sigma.min)
    assert (exact - truth).square().mean().sqrt() > 0.1

"""`python -m study.sample`: what it draws is what the run drew, and it writes what it was told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from studies import write

from study import evaluate, interop
from study.data import to_uint8
from study.run import main as run
from study.sample import main
from study.saved import load

STUDY = """\
question: Does it work?
base:
  network: {kind: mlp, width: 16, depth: 1}
  budget: {images: 256}
  batch: 64
  discretization: {kind: fixed, N: 10}
sources:
  edm: {objective: denoising}
variants:
  ct: {auxiliary: denoising_head}
cells:
  digits: {data: digits, measure: {fid: {extractor: digits-cnn, samples: 64, nfe: [1], draws: 1}}}
  plane:
    data: {kind: mixture, means: [[-1.0, 0.0], [1.0, 0.5]], std: 0.2}
    measure: {sliced_wasserstein: {samples: 64, nfe: [1], draws: 1}}
measure: {at: [0.5, 1.0]}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs by variant and cell; a source's by its name and data."""
    path = write(tmp_path_factory.mktemp("sampled"), STUDY)
    assert run([str(path), "--results", str(path.parent), "--workers", "0"]) == 0
    found = {}
    for folder in (path.parent / "small" / "runs").iterdir():
        name, *cell, _, _ = folder.name.split("-")
        cell = cell or ["digits" if "digits" in (folder / "run.json").read_text() else "plane"]
        found[f"{name}-{cell[0]}"] = folder
    return found


def drawn(path: Path) -> np.ndarray:
    """A picture's pixels."""
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("name", ["ct-digits", "edm-digits", "ct-plane", "edm-plane"])
def test_by_default_it_is_the_runs_own_picture(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "own.png"
    assert main([str(folders[name]), "--out", str(out)]) == 0
    assert out.read_bytes() == (folders[name] / "samples.png").read_bytes()


@pytest.mark.parametrize("name", ["ct-digits", "edm-digits"])
def test_weights_go_out_and_draw_the_same(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(folders[name]), "--export", "net.safetensors"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    assert main(["net.safetensors"]) == 0
    assert Path("samples.png").read_bytes() == (folders[name] / "samples.png").read_bytes()
    assert main(["net.safetensors", "--export", "again.safetensors"]) == 0
    assert Path("again.safetensors").read_bytes() == Path("net.safetensors").read_bytes()


def test_snapshots_averages_and_steps_are_those_asked_for(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    ct, seen = folders["ct-digits"], {}
    asked = "", "--at 0.5", "--ema 0.1", "--ema raw", "--nfe 2", "--nfe 2 --mid 2", "--seed 1"
    for words in asked:
        out = tmp_path / "x.npy"
        assert main([str(ct), "--count", "5", "--out", str(out), *words.split()]) == 0
        seen[words] = np.load(out)
    assert len({x.tobytes() for x in seen.values()}) == len(seen)
    model = load(ct, 0.5, "raw")
    snapshot = torch.load(ct / "snapshots" / "0.500.pt", weights_only=True)["raw"]
    assert all(torch.equal(model.weights[k], snapshot[k]) for k in snapshot)
    record = {"samples": 5, "nfe": 2, "mid": 2.0}
    model, device = load(ct, 1.0, None), torch.device("cpu")
    x = evaluate.samples(model.function(device), record, (1, 8, 8), model.sigma, 0, -1, device)
    assert np.array_equal(x.numpy(), seen["--nfe 2 --mid 2"])
    assert main([str(ct), "--count", "5", "--out", str(tmp_path / "y.npy"), "--batch", "2"]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), seen[""], atol=1e-5)


def test_a_folder_of_images(folders: dict[str, Path], tmp_path: Path) -> None:
    words = [str(folders["ct-digits"]), "--count", "12"]
    assert main([*words, "--out", f"{tmp_path}/images/"]) == 0
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == [
        f"{i:06d}.png" for i in range(12)
    ]
    assert main([*words, "--out", str(tmp_path / "x.npy")]) == 0
    pixels = to_uint8(torch.from_numpy(np.load(tmp_path / "x.npy")))
    for i in range(12):
        assert np.array_equal(drawn(tmp_path / "images" / f"{i:06d}.png"), pixels[i, 0].numpy())
    assert main([*words, "--out", f"{tmp_path}/images"]) == 2  # there, and not empty
    assert main([*words, "--out", str(tmp_path / "grid.png")]) == 0
    grid = drawn(tmp_path / "grid.png")  # 4 x 4 places of 10 pixels, each 8 times as large
    assert grid.shape == (320, 320) and (grid[240:] == 96).all()
    assert np.array_equal(grid[8:72:8, 8:72:8], pixels[0, 0].numpy())
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("words, said", [
    ("edm-digits --nfe 2", "is a denoiser; an odd number from 3"),
    ("edm-digits --nfe 4", "an odd number from 3"),
    ("ct-digits --nfe 3", "is a consistency model; 1 or 2 expected"),
    ("ct-digits --nfe 2 --mid 100", "--mid 100.0: a noise level from 0.002 to 80.0"),
    ("ct-digits --count 0", "--count 0: a whole number from 1"),
    ("ct-digits --seed -1", "--seed -1"),
    ("ct-digits --at 0.25", "--at 0.25: no such snapshot; did you mean '0.5'"),
    ("ct-digits --ema 0.2", "ema 0.2: no such average"),
    ("ct-digits --out TMP/x.jpg", "a .png, a .npy or a folder"),
    ("ct-digits --out TMP/no/x.png", "no folder"),
    ("ct-digits --export TMP/x.pt", "ends in .safetensors"),
    ("ct-plane --out TMP/x/", "the samples are vectors"),
    ("TMP", "no run.json in it"),
    ("TMP/gone.pkl", "no such file"),
])  # fmt: skip
def test_what_cannot_be_is_said_in_one_line_and_nothing_is_written(
    words: str,
    said: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, *rest = words.replace("TMP", str(tmp_path)).split()
    rest += [] if "--out" in rest else ["--out", str(tmp_path / "x.png")]
    assert main([str(folders.get(model, model)), *rest]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([str(folders["ct-digits"]), "--device", "cuda"]) == 2
    assert "no GPU here" in capsys.readouterr().err


def test_a_file_says_what_its_weights_are_of(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = folders["ct-digits"] / "snapshots" / "1.000.pt"
    assert main([str(snapshot), "--out", str(tmp_path / "x.png")]) == 2
    assert "does not say what network" in capsys.readouterr().err
    assert main([str(folders["ct-plane"]), "--export", str(tmp_path / "v.safetensors")]) == 0
    file = tmp_path / "v.safetensors"
    assert main([str(file), "--out", str(tmp_path / "x.png")]) == 2  # the plane is not in it
    assert "a .npy expected" in capsys.readouterr().err
    assert main([str(file), "--out", str(tmp_path / "x.npy")]) == 0
    assert np.load(tmp_path / "x.npy").shape == (2048, 2)
    found = interop.read(file)
    refused = [({"kind": "nothing"}, (2,), "is unknown here"),
               (found.network, (1, 2, 10**9), "(C, S, S) up to 1024"),
               (found.network, (3,), "inp.weight (16, 2), here (16, 3)")]  # fmt: skip
    for network, shape, said in refused:
        interop.write(replace(found, network=network, shape=shape))
        assert main([str(file), "--out", str(tmp_path / "y.npy")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "y.npy").exists()

"""What a study names and does not hold: folders of images, files of weights.

Both are told apart by a name and not by where they lie, so that they may move: their content is
digested into trained.json when a run starts, and a run refuses to go on with another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from os.path import abspath
from pathlib import Path
from typing import assert_never

from study.errors import StudyError
from study.factors import Factors, FromWeights
from study.meaning import ignored
from study.spec import Recipe
from study.subjects import (
    Cifar10,
    Data,
    Digits,
    FashionMnist,
    FittedMixture,
    Images,
    Mixture,
)


def weights_file(factors: Factors) -> Path | None:
    """The file that a run's first weights come from."""
    outside = isinstance(factors.init, FromWeights) and "init" not in ignored(factors)
    return Path(factors.init.weights) if outside else None


def present(path: Path) -> Path:
    """The path. Raises StudyError where no file is there."""
    if not path.is_file():
        raise StudyError(f"init.weights: {path}: no such file (looked for in {Path.cwd()})")
    return path


def lacking(data: Data) -> str | None:
    """What of the data's files is not here, and whether it will be downloaded; None where nothing
    is lacking. No file is decoded or fetched."""
    match data:
        case Digits() | Mixture():
            return None
        case FittedMixture(of=of):
            return lacking(of)
        case Images(root=root):
            return None if Path(root).exists() else f"{root} is not there"
        case Cifar10(root=root):
            from study import cifar10  # numpy, which is not needed otherwise

            place = Path(root or cifar10.DEFAULT_ROOT)
            size = 0 if cifar10.find(place) else cifar10.SIZE
        case FashionMnist(root=root):
            from study import fashion_mnist

            place = Path(root or fashion_mnist.DEFAULT_ROOT)
            try:
                found = fashion_mnist.find(place)
            except StudyError as error:
                return str(error)
            size = sum(fashion_mnist.FILES[k].size for k, path in found.items() if not path)
        case _:
            assert_never(data)
    if not size:
        return None
    kind = data.__struct_config__.tag
    return f"{kind} is not in {place}; will be downloaded ({size / 1e6:.0f} MB)"


def _places(factors: Factors) -> Iterator[tuple[str, str, str, str]]:
    """Key, name and path of each, and how to tell two of one name apart."""
    if isinstance(factors.data, Images):
        yield "data.root", factors.data.name, factors.data.root, "give each a data.name of its own"
    if path := weights_file(factors):
        yield "init.weights", path.name, str(path), "rename one"


def check_places(recipes: Iterable[Recipe], where: Callable[[Recipe], str]) -> None:
    """No two places of one study have one name. Raises StudyError; where: a recipe's place."""
    known: dict[tuple[str, str], str] = {}
    for recipe in recipes:
        for key, name, path, mend in _places(recipe.factors):
            other = known.setdefault((key, name), path)
            if abspath(other) != abspath(path):
                raise StudyError(
                    f"{where(recipe)}.{key}: {path!r} and {other!r} are both called {name!r}; "
                    f"{mend}"
                )

"""What is known of data before they are read: how large the images are and how many, and so which
extractor fits and how many references there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from study.errors import StudyError
from study.factors import Factors
from study.metrics import Measure
from study.settings import IN_FEATURES, filled
from study.subjects import Data, FittedMixture, Images, Mixture

# images of each data set's smaller part, and of the part that is trained on
HELD_OUT = {"digits": 400, "fashion_mnist": 10_000, "cifar10": 5_000}
TRAIN = {"digits": 997, "fashion_mnist": 50_000, "cifar10": 50_000}
SIDE = {"digits": 8, "fashion_mnist": 28, "cifar10": 32}
CHANNELS = {"digits": 1, "fashion_mnist": 1, "cifar10": 3}

Where = Callable[[str], str]  # file and key path, as written, of a key


def references_in(factors: Factors) -> int:
    """How many points references are drawn from; of a folder of images nobody knows before it is
    read."""
    data = factors.data
    if isinstance(data, Mixture | FittedMixture):
        return data.samples or factors.batch
    n = TRAIN.get(data.__struct_config__.tag, 1_000_000)
    return 2 * n if factors.augment == "flip" else n


def shape_of(data: Data) -> tuple[int, ...] | None:
    """The shape of one x; None of a folder of images, which nobody knows before it is read."""
    if isinstance(data, Mixture):
        return (len(data.means[0]),)
    data = data.of if isinstance(data, FittedMixture) else data
    kind = data.__struct_config__.tag
    return None if isinstance(data, Images) else (CHANNELS[kind], SIDE[kind], SIDE[kind])


def images_in(data: Data) -> dict[str, int]:
    """How many images there are of each part; many of endless draws or where nobody looked."""
    many, kind = 1_000_000, data.__struct_config__.tag
    if isinstance(data, FittedMixture):
        return {"train": data.samples or many, "held_out": data.held_out}
    if isinstance(data, Images):
        return {"train": many, "held_out": data.held_out or many}
    return {"train": TRAIN.get(kind, many), "held_out": HELD_OUT.get(kind, many)}


def check_extractors(measure: Measure, image: tuple[int, int], data: str, where: Where) -> None:
    """Every extractor asked for takes images of the data's (channels, side)."""
    for metric in ("fid", *IN_FEATURES):
        name = getattr(getattr(measure, metric), "extractor", None)
        domain = name and name.rpartition("-")[0]
        if domain not in SIDE:  # none, or one that takes any images
            continue
        takes = CHANNELS[domain], SIDE[domain]
        if takes != image:
            found, allowed = (f"{c} x {side} x {side}" for c, side in (image, takes))
            raise StudyError(
                f"{where(metric)}: {name} is not an extractor for {data}: it takes {allowed} "
                f"images, and those are {found}"
            )


def check_counts(measure: Measure, parts: Mapping[str, int], data: str, where: Where) -> None:
    """No more samples are asked for than there are images of each part to compare them with."""
    for metric in ("fid", *IN_FEATURES, "memorisation"):
        ask = filled(measure, metric)
        against = {"coverage": ("train",), "memorisation": tuple(parts)}.get(metric)
        for part in (against or ask.reference) if ask else ():
            if ask.samples > parts[part]:
                more = "" if against or part == "train" else "; or say reference: [train]"
                raise StudyError(
                    f"{where(metric)}: {ask.samples} samples; it compares equal numbers, and "
                    f"{data} has {parts[part]} images in {part} to compare with{more}"
                )

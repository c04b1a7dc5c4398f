"""A stranger's study file: whatever it asks for, it takes no memory or time out of proportion."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hostile import held_to, peak
from studies import TWO_MODES, replaced, write

from study.errors import StudyError
from study.layers import MAX_BYTES
from study.resolve import load
from study.run import main

MIXTURE = "data: {kind: mixture, means: [[-1.0], [1.0]], std: 0.2, samples: 500}"


def doubled(line: str, levels: int = 40) -> str:
    """Anchors, each of which stands twice in the next."""
    lines = ["a0: &a0 {x: 1}"]
    return "\n".join([*lines, *(line.format(n=i, m=i - 1) for i in range(1, levels))]) + "\n"


def sources(order: int) -> str:
    """A study of 150 sources, each with the weights of another, in the order given or against."""
    names = [f"  e{i}: {{objective: denoising, init: {{run: e{i - 1}}}}}" if i else
             "  e0: {objective: denoising}" for i in range(150)][::order]  # fmt: skip
    return TWO_MODES.replace("sources:\n", "sources:\n" + "\n".join(names) + "\n")


MUCH = {
    "aliases that double": (doubled("a{n}: &a{n} [*a{m}, *a{m}]"), "line 1[0-9]: over 100000"),
    "aliases of mappings": (doubled("a{n}: &a{n} {{x: *a{m}, y: *a{m}}}"), "over 100000 values"),
    "merges that double": (
        doubled("a{n}: &a{n} {{<<: [*a{m}, *a{m}], y{n}: 1}}"), "over 100000 values"),
    "one alias many times": (
        "a: &a [" + "1, " * 1000 + "]\nb: [" + "*a, " * 1000 + "]\n", "over 100000 values"),
    "a value inside itself": ("base: &a {data: {b: [*a]}}\n", "'a' nested in itself"),
    "deep brackets": ("base: " + "[" * 100_000, "nested too deeply; allowed: 32"),
    "deep lists": ("- " * 100_000, "nested too deeply"),
    "a long file": (TWO_MODES + "#" * MAX_BYTES, "over 262144 bytes"),
    "a number of 6 000 digits": (replaced("images: 1280", f"images: 0x{'f' * 5000}"), "64 bits"),
    "a number of 400 digits": (replaced("std: 0.2", f"std: 1{'0' * 400}"), "base.data.std: .*64"),
    "seeds": (replaced("[0, 1]", str([*range(20_000)])), "come to 60000 runs; allowed: 20000"),
    "cells": (
        TWO_MODES.replace("primary", "#") + "cells:\n"
        + "".join(f"  c{i}: {{}}\n" for i in range(8000)), "come to 48000 runs"),
    "shares of the budget": (
        replaced("at: [0.5, 1.0]", f"at: {[1.0] * 3000}"), "measure.at: .* length <= 100"),
    "steps times averages": (
        replaced("draws: 1", f"draws: 1, nfe: {[1] * 2000}"), "nfe: .* length <= 2"),
    "averages": (replaced("batch: 64", f"batch: 64\n  weights_ema: {[0.05] * 99}"), "weights_ema"),
    "numbers to be measured": (
        replaced("[0, 1]", str([*range(6000)])).replace("at: [0.5, 1.0]",
        f"at: {[i / 200 for i in range(101, 201)]}").replace("images: 1280", "images: 64000"),
        "over 1000000 numbers"),
    "training points": (replaced("samples: 500", f"samples: {10**15}"), "data.samples: 1000"),
    "held-out points": (
        replaced("samples: 500", f"held_out: {10**12}"), "data.held_out: .*allowed: 268435456"),
    "images of a fitted mixture": (
        TWO_MODES.replace(MIXTURE, "data: {kind: fitted_mixture, of: fashion_mnist, samples: "
                          f"{10**9}}}").split("measure:")[0].replace("primary", "#"),
        "data.samples: 1000000000 of 784 numbers each; allowed: 342392"),
    "variants from variants": (
        TWO_MODES.replace("  ct: {score", "  v0: {from: ct}\n" + "".join(
            f"  v{i}: {{from: v{i - 1}}}\n" for i in range(1, 1200)) + "  ct: {score"),
        "from: the last of over 100 in a row"),
    "sources of sources": (sources(1), "over 100 sources in a row"),
    "sources of sources, backwards": (sources(-1), "over 100 sources in a row"),
}  # fmt: skip


@pytest.mark.parametrize("case", MUCH)
def test_asking_for_much_is_refused_soon_and_in_a_short_sentence(
    case: str, tmp_path: Path
) -> None:
    text, told = MUCH[case]
    path, start, before = write(tmp_path, text), time.monotonic(), peak()
    with pytest.raises(StudyError, match=f"(?s){told}") as error:
        load(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 1000
    assert time.monotonic() - start < 30 and peak() - before < 300_000  # KiB
    assert sorted(os.listdir(tmp_path)) == ["small.yaml"]


def test_a_billion_laughs_take_no_memory(tmp_path: Path) -> None:
    path = write(tmp_path, doubled("a{n}: &a{n} [*a{m}, *a{m}]"))
    done = held_to(50, "from study.run import main\nsys.exit(main([sys.argv[1], '--plan']))", path)
    assert done.returncode == 2 and "over 100000 values" in done.stderr, done.stderr


TAGS = ("!!python/object/apply:os.system ['touch executed']", "!!python/name:os.system ''",
        "!!bool abc", "!!set {a}", "!!binary YQ==", "!!timestamp x", "!mine {a: 1}",
        "! a")  # fmt: skip


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_is_refused_by_name(
    tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, f"question: {tag}\n" + TWO_MODES.partition("\n")[2])
    with pytest.raises(StudyError, match="line 1: the tag .*allowed: none"):
        load(path)
    with pytest.raises(StudyError, match="line 1: the tag"):
        load(write(tmp_path), (f"question={tag}",))
    assert sorted(os.listdir(tmp_path)) == ["small.yaml"]


def test_anchors_may_be_used(tmp_path: Path) -> None:
    text = replaced("{score: single_sample}", "&a {score: single_sample}")
    assert len(load(write(tmp_path, text + "cells: {b: &b {batch: 64}, c: *b}\n")).runs) == 12


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "a\\b", "", "-a", ".a", "é", "a b", "a\\n",
                                  "a\\0b", "a" * 65])  # fmt: skip
@pytest.mark.parametrize("where", ["variants", "sources", "cells"])
def test_names_outside_the_alphabet_are_refused(where: str, name: str, tmp_path: Path) -> None:
    new = {"variants": ("  ct: {", f'  "{name}": {{'), "sources": ("  edm: {", f'  "{name}": {{'),
           "cells": ("seeds:", f'cells: {{"{name}": {{}}}}\nseeds:')}[where]  # fmt: skip
    text = replaced(*new).replace("primary", "#")
    with pytest.raises(StudyError, match=f"{where}|special characters"):
        load(write(tmp_path, text))
    file = write(tmp_path, name="small")
    if name and "/" not in name and "\\" not in name and name != "..":
        with pytest.raises(StudyError, match="a study's name has"):
            load(file.rename(file.with_name(f"{name}.yaml")))


def test_a_data_sets_name_ends_where_it_seems_to(tmp_path: Path) -> None:
    text = TWO_MODES.replace(MIXTURE, 'data: {kind: images, root: x, name: "a\\n"}')
    with pytest.raises(StudyError, match="base.data.name"):
        load(write(tmp_path, text.split("measure:")[0].replace("primary", "#")))


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe", "zero", "folder"):
        with pytest.raises(StudyError, match=f"{name}.yaml: cannot be read"):
            load(tmp_path / f"{name}.yaml")


def test_a_terminal_is_not_commanded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, replaced("  batch:", '  "\\e]0;mine\\a[red]\\e[2J": 1\n  batch:'))
    assert main([str(path), "--plan"]) == 2
    told = capsys.readouterr().err
    assert "\x1b" not in told and "\x07" not in told and "\\x1b]0;mine\\x07[red]" in told

"""Builds results/STUDY/report/ from run folders: report.html, report.md, CSV tables and figures.

The report can be deleted and rebuilt at any time, also while runs are still missing: it says what
it stands on. The same run folders give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the root, not analysis/, comes first
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from urllib.parse import quote

import pandas as pd

from analysis import answer, factorial, ledger, load, plots, sections, stats, tables, words
from analysis.document import Block, Figure, Items, Link, Section, Table, Text, html, markdown
from analysis.files import WITH_FLOOR
from analysis.identities import standing
from analysis.levels import lacking, points, rounded, yet
from analysis.load import Cell, Study
from analysis.shared import owed
from analysis.style import capital
from study.bounded import check_entries
from study.errors import StudyError, several

OPTIONAL = ("map_error", "instruments", "mean_and_noise")  # files only where there are data
STATES = ("done", "failed", "unfinished", "pending")
LISTED = 20  # entries of a list before it says "and N more"
ALT = {"effects": "effects with intervals", "curves": "metric against budget",
       "score_error": "score error against sigma", "map_error": "map error against sigma",
       "samples": "samples of every variant", **sections.ALT}
TRACED = ("Every number here is computed from measures.csv, whose last column names the file in "
          "the study folder that a value was read from. The run folder around it holds run.json "
          "(what was trained), trained.json (what it cost) and attempts.jsonl (where it ran). "
          "comparisons.csv lists the per-seed differences of every effect in its column points.")


def build(folder: Path) -> Path:
    """Writes the report of a study folder and returns the path of its report.html.

    Raises StudyError if study.json cannot be read.
    """
    study = load.load(folder)
    out = folder / "report"
    check_entries(folder, folder, folders=("report",))
    out.mkdir(exist_ok=True)
    check_entries(out, out)
    table, mismatches = tables.comparisons(study), ledger.audit(study)
    frames = {"runs": study.runs, "measures": study.measures, "comparisons": table,
              "score_error": study.score_errors, "map_error": study.map_errors,
              "instruments": study.instruments, "mean_and_noise": factorial.effects(study)}
    for name, frame in frames.items():
        if name in OPTIONAL and frame.empty:
            continue
        frame.to_csv(out / f"{name}.csv", index=False, float_format="%.10g", lineterminator="\n")
    pictures = plots.draw_all(study, table, out)
    plots.preview(study, table, out / "preview.png")

    def figures(kind: str) -> list[Block]:
        return [Figure(p.file, f"{ALT[kind]}, {p.cell.name}",
                       f"{p.caption} {ledger.standing(p.cell, mismatches, p.ids)}".strip())
                for p in pictures.get(kind, [])] or [Text(f"No data{yet(study)}: {ALT[kind]}.")]

    def there(kind: str) -> list[Block]:
        return figures(kind) if kind in pictures else []

    def each(made: Callable[..., list[Block]], *given: object) -> list[Block]:
        return [block for cell in study.cells for block in made(cell, *given)]

    sigma = [b for kind in ("score_error", "map_error")
             if kind in pictures or lacking(study, kind) for b in figures(kind)]
    one = "curves" not in pictures and len(points(study)) == 1
    curves = [Text("No curve: measured at one point of the budget.")] if one else figures("curves")
    parts = [
        Section("Question", [Text(study.question or "(none stated)", "question")]),
        Section("Answer", [*(Text(t, "answer") for t in answer.answers(study, table)),
                           *_beside(study, table, frames["mean_and_noise"], mismatches)]),
        Section("Variants", each(_variants)),
        Section("Completeness", _completeness(study)),
        Section("Comparisons", [*each(_comparisons, table, mismatches), Text(words.GLOSSARY),
                                *_described(table), *figures("effects")]),
        *factorial.section(study, frames["mean_and_noise"]),
        Section("Metric against budget", [*each(_values, mismatches), *curves]),
        *([Section("Score error against sigma", sigma)] if sigma else []),
        *sections.sections(study, there),
        Section("Samples", figures("samples")),
        Section("Ledger audit", _audit(study, mismatches)),
        Section("Provenance", _provenance(study)),
        Section("From a number to its run", [Text(TRACED), *each(_trace)])]
    title = f"Study {study.name}"
    (out / "report.md").write_text(markdown(title, parts), encoding="utf-8")
    (out / "report.html").write_text(html(title, parts, out), encoding="utf-8")
    return out / "report.html"


def _beside(study: Study, table: pd.DataFrame, squares: pd.DataFrame,
            mismatches: list[ledger.Mismatch]) -> list[Block]:
    """What stands under the answer: the comparisons that the study names, mean and noise, other
    comparisons, what more seeds would show, what all seeds share, and what of data, code and
    machines they do not.
    """
    items = (*answer.named(study, table), *factorial.sentences(study, squares),
             *answer.beside(study, table))
    lines = [*answer.powers(study, table),
             *(c.prefix + text for c in study.cells if (text := owed(c, tables.variants(c)))),
             *(c.prefix + capital(text) for c in study.cells if (text := rounded(c))),
             *(m.sentence for m in mismatches if m.what in ledger.ANSWERED)]
    return [*([Items(items)] if items else []), *(Text(t) for t in lines)]


def _variants(cell: Cell) -> list[Block]:
    rows, shared = words.recipes(cell)
    return [Table(("variant", "how it is trained", "images"), rows,
                  f"{cell.name}. Named are a variant's own factors; all else is as most variants "
                  f"have it: {shared}.")]


def _completeness(study: Study) -> list[Block]:
    runs = study.runs.drop_duplicates("id")
    counts = runs["state"].value_counts()
    diverged = int((runs.outcome == "diverged").sum())
    detail = ", ".join(f"{counts.get(s, 0)} {s}" + (f" ({diverged} of them diverged)" if
                       s == "done" and diverged else "") for s in STATES)
    rows = []
    for (cell, name), group in study.runs.groupby(["cell", "name"], sort=False):
        state = group["state"].value_counts()
        lacking = study.missing[(study.missing.cell == cell) & (study.missing.name == name)]
        rows.append((str(cell), str(name), group["role"].iloc[0], str(len(group)),
                     *(str(state.get(s, 0)) for s in STATES),
                     str((group.outcome == "diverged").sum()), str(len(lacking)),
                     ", ".join(x for x in group.same_as.unique() if x)))
    header = ("cell", "name", "role", "planned", *STATES, "diverged", "measurements missing",
              "same runs as")
    keep = [k for k in range(len(header)) if k < 5 or any(row[k] not in ("0", "") for row in rows)]
    blocks: list[Block] = [
        Text(f"{several(len(runs), 'run')} planned: {detail}. Unfinished means running, "
             "interrupted or to measure."),
        Table([header[k] for k in keep], [[row[k] for k in keep] for row in rows],
              "Names that mean the same run share its folder and are counted once."
              if study.runs.same_as.any() else "")]
    bad = runs[(runs["state"] == "failed") | (runs.outcome == "diverged")]
    if len(bad):
        blocks.append(Items(_some(f"{r.folder}: {r.outcome or r.state}: {r.reason}; log in "
                                  f"{r.folder}/log.txt" for r in bad.itertuples())))
    return blocks


def _comparisons(cell: Cell, table: pd.DataFrame, mismatches: list[ledger.Mismatch]
                 ) -> list[Block]:
    rows, endpoint = plots.shown(table, cell)
    if rows.empty:
        return [Text(f"{cell.name}: nothing to compare{yet(cell.study)}.")]
    log = stats.is_log(endpoint["metric"])
    verdicts = bool((rows.n >= stats.VERDICT_FROM).any())
    header = ["compared", "differs in", "effect", "95 % interval", "95 % pooled", "seeds",
              *(["Holm p", "sign-flip p", "verdict"] if verdicts else []),
              "images equal", "with sources"]
    body = [(f"{r.variant} − {r.baseline}" + standing(r, ", on {}"), r.differs,
             words.change(r.effect, log) if r.n else "–", words.interval(r.low, r.high, log),
             words.interval(r.low_pooled, r.high_pooled, log),
             f"{r.n}/{r.planned}" + (f", {r.diverged} diverged" if r.diverged else ""),
             *((words.p_text(r.p_holm), words.p_text(r.sign_flip_p), r.verdict.split(":")[0])
               if verdicts else ()), r.matched, r.matched_with_sources)
            for _, r in rows.iterrows()]
    measured = tables.select(cell.measures, endpoint)
    caption = [f"{cell.name}: {tables.described(endpoint)}. Effects above 0 mean worse than the "
               "baseline" + ("; percent of a ratio of geometric means." if log else "."),
               *([] if verdicts else ["Screening: effects and intervals, no verdicts."]),
               ledger.standing(cell, mismatches, measured["id"])]
    if rows.shared.any():
        caption.append(f"No verdict on a side that is {words.ONE_NETWORK}.")
    if endpoint["reference"] == "held_out":
        caption.append(words.seen(cell, measured))
    if verdicts:
        caption.append("Verdicts are on the claim that A, of A − B, is worse. Refuted: the claim "
                       "that A is worse is refuted: the 95 % upper bound lies below the margin. "
                       "Holm's adjustment over all but the primary guards \"supported\" only.")
    if rows[["variant", "baseline"]].isin(cell.fixed).any(axis=None):
        caption.append("Against a fixed point, which is computed without training, what is "
                       "left is the network's own error.")
    if (rows.equal_variances_p < 0.05).any():
        caption.append("The variants' residual variances differ (Brown-Forsythe p < .05): do "
                       "not trust the pooled intervals.")
    whats = [w for w in rows.identity.unique() if w]
    if len(whats) > 1:
        caption.append("Values of unlike identity stand in rows of their own: "
                       + "; ".join(whats) + ".")
    return [Table(header, body, " ".join(filter(None, caption)),
                  [i for i, r in enumerate(rows.role) if r == "primary"])]


def _described(table: pd.DataFrame) -> list[Block]:
    rest = int((table.role == "descriptive").sum())
    return [Text(
        f"Described in comparisons.csv and not tested: {several(rest, 'more comparison')}, "
        "at other points, numbers of evaluations and metrics.")] if rest else []


def _values(cell: Cell, mismatches: list[ledger.Mismatch]) -> list[Block]:
    rows, sources = (cell.measures[cell.measures.role == role] for role in ("variant", "source"))
    standing = ledger.standing(cell, mismatches, rows["id"])
    frame, blocks = tables.summary(cell, "variant"), []
    if len(frame):
        blocks.append(_value_table(cell, frame, "variants", standing, words.seen(cell, rows)))
    frame = tables.summary(cell, "source")  # teachers and twins are measured unlike
    for _, part in frame.groupby(frame.notna().apply(tuple, axis=1) if len(frame) else []):
        part = part.dropna(axis=1, how="all")
        blocks.append(_value_table(cell, part, "sources", owed(cell, part.index),
                                   words.seen(cell, sources)))
    return blocks


def _value_table(cell: Cell, frame: pd.DataFrame, what: str, *notes: str) -> Table:
    seeds = len(cell.study.seeds)
    body = [(name, *(words.value(v, seeds) for v in row))
            for name, row in zip(frame.index, frame.to_numpy(), strict=True)]
    return Table(("name", *tables.headings(list(frame.columns))), body, " ".join(filter(None, (
        f"{cell.name}, {what} at their last point:",
        "mean over seeds (smallest to largest; n runs where a seed is missing)."
        if seeds > 1 else "values of the one seed.", *notes))))


def _audit(study: Study, mismatches: list[ledger.Mismatch]) -> list[Block]:
    frame = ledger.spend(study)
    if frame.empty:
        return [Text("No run is trained yet.")]
    pairs = ("passes", "flops", "seconds")
    body = tuple((r["cell"], r["name"], f"{r['runs']:.0f}", words.count(r["images"]),
                  words.count(r["charged_images"]), words.count(r["images_total"]),
                  words.count(r["images_with_sources"]),
                  *(" / ".join((words.seconds if k == "seconds" else words.short)(r[k + s])
                               for s in ("", "_with_sources")) for k in pairs),
                  words.count(r["parameters"])) for r in frame.to_dict("records"))
    table = Table(("cell", "name", "runs", "images", "charged", "own + charged", "with sources",
                   *(f"{k} own / with sources" for k in ("passes", "FLOPs", "seconds")),
                   "parameters"), body,
                  "Mean per trained run. Matched means that own + charged images are equal within "
                  "a block; passes, FLOPs and seconds are not matched. A source is counted once "
                  "in each run that stands on it.")
    if not mismatches:
        return [Text("No mismatch: within every block own + charged images, data, noise and "
                     "initial weights are equal where they should be, all seeds of a cell "
                     "stand on the same data, and all runs share code, device, torch and "
                     "Python."), table]
    return [Text(f"{several(len(mismatches), 'mismatch')}:"),
            Items([m.sentence for m in mismatches]),
            table]


def _provenance(study: Study) -> list[Block]:
    lines = [f"{label}: " + (", ".join(
        f"{value} ({several(n, 'run')})" for value, n in
        ledger.environment(study.attempts, column).items()) or "no attempt recorded")
             for column, label in ledger.ENVIRONMENT]
    lines += [f"first weights: {name}, SHA-256 {digest[:16]} ({several(len(runs), 'run')})"
              for name, digests in study.files.items() for digest, runs in digests.items()]
    blocks: list[Block] = [Items(lines),
                           *sections.identities(study)]
    if len(study.missing):
        blocks += [Text("Not there of what is asked for: "
                        f"{several(len(study.missing), 'measurement')}:"),
                   Items(_some(f"{m.name}, {m.cell}, seed {m.seed}: {m.file}: {m.why}"
                               for m in study.missing.itertuples()))]
    else:
        blocks.append(Text("Every measurement asked for is there."))
    if study.problems:
        blocks += [Text(f"{several(len(study.problems), 'file')} could not be read:"),
                   Items(_some(study.problems))]
    return blocks


def _trace(cell: Cell) -> list[Block]:
    if not cell.primary:
        return []
    endpoint = tables.shown_endpoint(cell)
    rows = tables.select(cell.measures, endpoint)
    rows = rows[rows.name.isin([cell.primary["variant"], cell.primary["against"]])]
    body = [(str(r.seed), r.name, f"{r.value:.5g}", f"{r.floor:.4g}" if r.floor == r.floor
             else "–", Link(r.file, "../" + quote(r.file)))
            for r in rows.sort_values("seed", kind="stable").head(2 * LISTED).itertuples()]
    lacking = endpoint["metric"] in WITH_FLOOR and bool(rows["floor"].isna().any())
    return [Table(("seed", "variant", tables.title(endpoint["metric"], endpoint["nfe"]),
                   "real against real", "file"), body,
                  f"The primary comparison of {cell.name}, run by run."
                  + f" {capital(words.NO_FLOOR)}." * lacking
                  + f" {words.seen(cell, rows)}".rstrip())]


def _some(lines: object) -> tuple[str, ...]:
    every = tuple(lines)
    more = (f"and {len(every) - LISTED} more",) if len(every) > LISTED else ()
    return every[:LISTED] + more


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.report", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Turn the run folders of a study into results/STUDY/report/.",
        epilog="""examples:
  python -m analysis.report                 every study under results/
  python -m analysis.report grid            results/grid
  python -m analysis.report /data/old/grid  a study folder anywhere

It works on a study that is still running and says what is missing. The folder report/ holds
report.html (one file, nothing fetched), report.md, preview.png, the figures, and as CSV: runs,
measures (every value with the file it came from), comparisons, mean_and_noise (the 2 x 2),
score_error, map_error, instruments (every value over noise levels, N, classes or modes, one a
row). It can be deleted and rebuilt; the same run folders give the same bytes.

exit status: 0 done; 2 a study is missing or cannot be read""")
    parser.add_argument("study", nargs="*", metavar="STUDY",
                        help="a name under results/, its file under sweeps/, or a study folder; "
                             "none: all under results/")
    names = parser.parse_args(arguments).study
    results, code = Path("results"), 0
    try:
        folders = [load.find(n, results) for n in names or load.known(results)]
        if not folders:
            raise StudyError(f"{results}/: no study here; start one with "
                             "python -m study.run sweeps/grid.yaml, or name a study folder")
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for folder in folders:
        try:
            print(build(folder))
        except StudyError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())

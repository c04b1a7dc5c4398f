"""Builds results/STUDY/report/ from run folders: report.html, report.md, CSV tables and figures.

The report can be deleted and rebuilt at any time, also while runs are still missing: it says what
it stands on. The same run folders give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the root, not analysis/, comes first
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math
from urllib.parse import quote

import pandas as pd
from matplotlib.ticker import EngFormatter

from analysis import ledger, load, plots, stats, tables
from analysis.document import Block, Figure, Items, Link, Section, Table, Text, html, markdown
from analysis.load import Study
from study.spec import StudyError

SI = EngFormatter(sep="\u00a0")
LISTED = 20  # entries of a list before it says "and N more"
ALT = {"effects": "effects with intervals", "curves": "metric against budget",
       "score_error": "score error against sigma", "map_error": "map error against sigma",
       "samples": "samples of every variant"}


def build(folder: Path) -> Path:
    """Writes the report of a study folder and returns the path of its report.html.

    Raises StudyError if study.json cannot be read.
    """
    study = load.load(folder)
    out = folder / "report"
    out.mkdir(exist_ok=True)
    table, mismatches = tables.comparisons(study), ledger.audit(study)
    frames = {"runs": study.runs, "measures": study.measures, "comparisons": table,
              "score_error": study.score_errors, "map_error": study.map_errors}
    for name, frame in frames.items():
        frame.to_csv(out / f"{name}.csv", index=False, float_format="%.10g", lineterminator="\n")
    pictures = plots.draw_all(study, table, out)
    plots.preview(study, table, out / "preview.png")

    def figures(kind: str) -> list[Block]:
        return [Figure(p.file, f"{ALT[kind]}, {p.cell}",
                       f"{p.caption} {ledger.standing(study, mismatches, p.cell, p.ids)}")
                for p in pictures.get(kind, [])] or [Text(f"No data yet: {ALT[kind]}.")]

    sections = [
        Section("Question", (Text(study.question or "(none stated)", "question"),)),
        Section("Answer", tuple(Text(t, "answer") for t in answers(study, table))
                + tuple(Text(t) for t in _powers(study, table))),
        Section("Completeness", tuple(_completeness(study))),
        Section("Comparisons", (*_comparisons(study, table, mismatches), *figures("effects"))),
        Section("Metric against budget", (*_values(study, mismatches), *figures("curves"))),
        Section("Score error against sigma", tuple(figures("score_error") + (
            figures("map_error") if "map_error" in pictures else []))),
        Section("Samples", tuple(figures("samples"))),
        Section("Ledger audit", tuple(_audit(study, mismatches))),
        Section("Provenance", tuple(_provenance(study))),
        Section("From a number to its run", tuple(_trace(study)))]
    title = f"Study {study.name}"
    (out / "report.md").write_text(markdown(title, sections), encoding="utf-8")
    (out / "report.html").write_text(html(title, sections, out), encoding="utf-8")
    return out / "report.html"


def answers(study: Study, table: pd.DataFrame) -> list[str]:
    """The primary comparison in one sentence per cell, with its interval and number of seeds."""
    sentences = []
    for cell in study.cells:
        where = f"In {cell}, " if len(study.cells) > 1 else ""
        rows = table[(table.cell == cell) & (table.role == "primary")]
        primary = study.primaries.get(cell)
        if primary is None:
            sentences.append(f"{where}no primary comparison is declared: nothing is tested.")
        elif rows.empty:
            sentences.append(f"{where}{primary['variant']} and {primary['against']} are the same "
                             "run: there is nothing to compare.")
        sentences += [where + _sentence(row) for _, row in rows.iterrows()]
    return [s[:1].upper() + s[1:] if s.startswith("no ") else s for s in sentences]


def _sentence(row: pd.Series) -> str:
    name, log = tables.title(row.metric, row.nfe), stats.is_log(row.metric)
    seeds = f"{row.n} of {row.planned} seeds"
    gone = (f" Diverged: {row.diverged_variant} of {row.variant}, {row.diverged_baseline} of "
            f"{row.baseline}." if row.diverged else "")
    if row.n == 0:
        return (f"not answered yet: no seed of {row.planned} has the {name} of both {row.variant} "
                f"and {row.baseline}.{gone}")
    size = (f"{abs(row.percent):.{1 if abs(row.percent) < 10 else 0}f}\u00a0%" if log
            else f"{abs(row.effect):.3g}")
    text = f"{row.variant}'s {name} is {size} {'higher' if row.effect > 0 else 'lower'} than " \
           f"{row.baseline}'s"
    show = plots.percent_text if log else _signed
    if row.n < stats.INTERVAL_FROM:
        points = ", ".join(show(float(p.split(":")[1])) for p in row["points"].split())
        return f"{text} ({seeds}: {points}; too few for an interval): {row.verdict}.{gone}"
    means = {"supported": f'the claim that {row.variant} is worse is supported',
             "refuted": f'the claim that {row.variant} is worse is refuted',
             "tie": "a tie within the margin"}
    return (f"{text} (95 % interval {_interval(row.low, row.high, log)}, {seeds}): "
            f"{means.get(row.verdict, row.verdict).replace('screening:', 'screening,')}.{gone}")


def _powers(study: Study, table: pd.DataFrame) -> list[str]:
    texts = []
    for _, row in table[table.role == "primary"].iterrows():
        margin = float(study.primaries[row.cell]["margin"])
        seeds = stats.seeds_needed(tables.effect_of(row), margin)
        size = plots.percent_text(margin) if stats.is_log(row.metric) else f"{margin:g}"
        if row.n and row.n < stats.VERDICT_FROM:
            texts.append(f"A verdict wants {stats.VERDICT_FROM} seeds or more; {row.n} show "
                         "effects and their spread.")
        elif seeds:
            texts.append(f"With the spread seen in {row.cell}, an effect as large as the margin "
                         f"({size}) would need {seeds} seeds to be found with a chance of 80 %.")
    return texts


def _completeness(study: Study) -> list[Block]:
    runs = study.runs.drop_duplicates("id")
    counts = runs["state"].value_counts()
    diverged = int((runs.outcome == "diverged").sum())
    detail = ", ".join(f"{counts.get(s, 0)} {s}" + (f" ({diverged} of them diverged)" if
                       s == "done" and diverged else "")
                       for s in ("done", "failed", "unfinished", "pending"))
    rows = []
    for (cell, name), group in study.runs.groupby(["cell", "name"], sort=False):
        state = group["state"].value_counts()
        lacking = study.missing[(study.missing.cell == cell) & (study.missing.name == name)]
        rows.append((str(cell), str(name), group["role"].iloc[0], str(len(group)),
                     *(str(state.get(s, 0)) for s in ("done", "failed", "unfinished", "pending")),
                     str((group.outcome == "diverged").sum()), str(len(lacking)),
                     ", ".join(x for x in group.same_as.unique() if x)))
    header = ("cell", "name", "role", "planned", "done", "failed", "unfinished", "pending",
              "diverged", "measurements missing", "same runs as")
    keep = [k for k in range(len(header)) if k < 5 or any(row[k] not in ("0", "") for row in rows)]
    blocks: list[Block] = [
        Text(f"{len(runs)} runs planned: {detail}. Unfinished means running or interrupted."),
        Table(tuple(header[k] for k in keep), tuple(tuple(row[k] for k in keep) for row in rows),
              "Names that mean the same run share its folder and are counted once.")]
    bad = runs[(runs["state"] == "failed") | (runs.outcome == "diverged")]
    if len(bad):
        blocks.append(Items(_some(f"{r.folder}: {r.outcome or r.state}: {r.reason}; log in "
                                  f"{r.folder}/log.txt" for r in bad.itertuples())))
    return blocks


def _comparisons(study: Study, table: pd.DataFrame, mismatches: list[ledger.Mismatch]
                 ) -> list[Block]:
    blocks: list[Block] = []
    for cell in study.cells:
        rows, endpoint = plots.shown(study, table, cell), tables.shown_endpoint(study, cell)
        if endpoint is None or rows.empty:
            blocks.append(Text(f"{cell}: nothing to compare yet."))
            continue
        log = stats.is_log(endpoint["metric"])
        verdicts = bool((rows.n >= stats.VERDICT_FROM).any())
        header = ["compared", "differs in", "effect", "95 % interval", "95 % pooled", "seeds",
                  *(["Holm p", "sign-flip p", "verdict"] if verdicts else []), "images matched"]
        show = plots.percent_text if log else _signed
        body = [(f"{r.variant} − {r.baseline}", r.differs, show(r.effect) if r.n else "–",
                 _interval(r.low, r.high, log), _interval(r.low_pooled, r.high_pooled, log),
                 f"{r.n}/{r.planned}" + (f", {r.diverged} diverged" if r.diverged else ""),
                 *((_p(r.p_holm), _p(r.sign_flip_p), r.verdict) if verdicts else ()), r.matched)
                for r in rows.itertuples()]
        ids = tables.select(study.measures[study.measures.cell == cell], endpoint)["id"]
        caption = [f"{cell}: {tables.described(endpoint)}. Effects above 0 mean worse than the "
                   "baseline" + ("; percent of a ratio of geometric means." if log else "."),
                   *([] if verdicts else ["Screening: effects and intervals, no verdicts."]),
                   ledger.standing(study, mismatches, cell, ids)]
        if verdicts:
            caption.append('Verdicts are on the claim "worse than the baseline"; Holm\'s '
                           'adjustment over the secondary comparisons guards "supported" only.')
        if (rows.equal_variances_p < 0.05).any():
            caption.append("The variants' residual variances differ (Brown-Forsythe p < .05): do "
                           "not trust the pooled intervals.")
        whats = [w for w in rows.identity.unique() if w]
        if len(whats) > 1:
            caption.append("Values of unlike identity stand in rows of their own: "
                           + "; ".join(whats) + ".")
        blocks.append(Table(tuple(header), tuple(body), " ".join(caption),
                            tuple(i for i, r in enumerate(rows.role) if r == "primary")))
    rest = int((table.role == "descriptive").sum())
    if rest:
        blocks.append(Text(f"{rest} more comparisons, at other points, numbers of evaluations and "
                           "metrics, are described in comparisons.csv; they are not tested."))
    return blocks


def _values(study: Study, mismatches: list[ledger.Mismatch]) -> list[Block]:
    blocks: list[Block] = []
    for cell in study.cells:
        for role in ("variant", "source"):
            frame = tables.summary(study, cell, role)
            if frame.empty:
                continue
            heads = tables.headings(list(frame.columns))
            body = tuple((name, *(_value(v, len(study.seeds)) for v in row))
                         for name, row in zip(frame.index, frame.to_numpy(), strict=True))
            rows = study.measures[(study.measures.cell == cell) & (study.measures.role == role)]
            caption = (f"{cell}, {role}s at their last point: mean over seeds (smallest to "
                       "largest; n runs where a seed is missing).")
            if role == "variant":
                caption += f" {ledger.standing(study, mismatches, cell, rows['id'])}"
            blocks.append(Table(("name", *heads), body, caption))
    return blocks


def _value(entry: tuple[float, float, float, int] | None, seeds: int) -> str:
    if entry is None:
        return "–"
    mean, low, high, n = entry
    return f"{mean:.3g} ({low:.3g} to {high:.3g}{'' if n == seeds else f'; n {n}'})"


def _audit(study: Study, mismatches: list[ledger.Mismatch]) -> list[Block]:
    frame = ledger.spend(study)
    if frame.empty:
        return [Text("No run is trained yet.")]
    pairs = ("passes", "flops", "seconds")
    body = tuple((r["cell"], r["name"], f"{r['runs']:.0f}", _count(r["images"]),
                  _count(r["charged_images"]), _count(r["images_total"]),
                  _count(r["images_with_sources"]),
                  *(f"{_si(r[k])} / {_si(r[k + '_with_sources'])}" for k in pairs),
                  _count(r["parameters"])) for r in frame.to_dict("records"))
    table = Table(("cell", "name", "runs", "images", "charged", "own + charged", "with sources",
                   *(f"{k} own / with sources" for k in ("passes", "FLOPs", "seconds")),
                   "parameters"), body,
                  "Mean per trained run. Matched means that own + charged images are equal within "
                  "a block; passes, FLOPs and seconds are not matched. A source is counted once "
                  "in each run that stands on it.")
    if not mismatches:
        return [Text("No mismatch: within every block own + charged images, data, noise and "
                     "initial weights are equal where they should be, and all runs share commit, "
                     "device, torch and Python."), table]
    return [Text(f"{len(mismatches)} mismatches:"), Items(tuple(m.sentence for m in mismatches)),
            table]


def _provenance(study: Study) -> list[Block]:
    lines = [f"{label}: " + (", ".join(f"{value} ({n} runs)" for value, n in
             ledger.environment(study.attempts, column).items()) or "no attempt recorded")
             for column, label in ledger.ENVIRONMENT]
    blocks: list[Block] = [Items(tuple(lines)),
                           Text("Metric identities; only equal ones are compared or averaged:"),
                           Items(tuple(study.measures.identity.unique()) or ("none yet",))]
    if len(study.missing):
        blocks += [Text(f"{len(study.missing)} measurements asked for are not there:"),
                   Items(_some(f"{m.name}, {m.cell}, seed {m.seed}: {m.file}: {m.why}"
                               for m in study.missing.itertuples()))]
    else:
        blocks.append(Text("Every measurement asked for is there."))
    if study.problems:
        blocks += [Text(f"{len(study.problems)} files could not be read:"),
                   Items(_some(study.problems))]
    return blocks


def _trace(study: Study) -> list[Block]:
    blocks: list[Block] = [Text(
        "Every number here is computed from measures.csv, whose last column names the file in the "
        "study folder that a value was read from. The run folder around it holds run.json (what "
        "was trained), trained.json (what it cost) and attempts.jsonl (where it ran). "
        "comparisons.csv lists the per-seed differences of every effect in its column points.")]
    for cell in study.cells:
        endpoint, primary = tables.shown_endpoint(study, cell), study.primaries.get(cell)
        if endpoint is None or primary is None:
            continue
        rows = tables.select(study.measures[study.measures.cell == cell], endpoint)
        rows = rows[rows.name.isin([primary["variant"], primary["against"]])]
        body = [(str(r.seed), r.name, f"{r.value:.5g}", f"{r.floor:.4g}" if r.floor == r.floor
                 else "–", Link(r.file, "../" + quote(r.file)))
                for r in rows.sort_values("seed", kind="stable").head(2 * LISTED).itertuples()]
        blocks.append(Table(("seed", "variant", tables.title(endpoint["metric"], endpoint["nfe"]),
                             "real against real", "file"), tuple(body),
                            f"The primary comparison of {cell}, run by run."))
    return blocks


def _interval(low: float, high: float, log: bool) -> str:
    if math.isnan(low):
        return "–"
    ends = [plots.percent_number(x) if log else _signed(x) for x in (low, high)]
    return " to ".join(ends) + ("\u00a0%" if log else "")


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "\u2212")


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "< .001" if value < 0.001 else f"{value:.3f}"


def _count(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.0f}"


def _si(value: float) -> str:
    return "–" if math.isnan(value) else SI(float(f"{value:.3g}"))


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
measures (every value with the file it came from), comparisons, score_error, map_error. It can be
deleted and rebuilt; the same run folders give the same bytes.

exit status: 0 done; 2 a study is missing or cannot be read""")
    parser.add_argument("study", nargs="*", metavar="STUDY",
                        help="a name under results/ or a study folder; none: all under results/")
    names = parser.parse_args(arguments).study
    results, code = Path("results"), 0
    try:
        folders = [load.find(n, results) for n in names or load.known(results)]
        if not folders:
            raise StudyError(f"{results}/: no study here; start one with "
                             "python -m study.run sweeps/grid.yaml, or name a study folder")
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    for folder in folders:
        try:
            print(build(folder))
        except StudyError as error:
            print(error, file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())

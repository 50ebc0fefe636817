"""Rows of results as text: Markdown to read, csv to compute with, LaTeX to print."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence

from utils.run_grid import Spread
from utils.table_rows import FACTS, METRICS, Metric, Row

MISSING = "n/a"

READING = (
    "Means +- standard deviations (n - 1) over seeds, of all scored test views; PSNR in dB, MB are 2^20 bytes. A mean "
    "over scenes is taken seed by seed, its spread is over seeds. `- full`: the difference to `full` (for TensorCP "
    "`full_cp`) with the same scene and seed. (2 of 3): from fewer seeds than the table has. n/a: not measured, or, of "
    "a mean over scenes, no seed has them all."
)


# --- csv: plain numbers ---
def csv_text(rows: Sequence[Row]) -> str:
    """res_table.csv: unrounded means, deviations and how many values apart; empty where unknown."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(_record(Row("", "", "", 0, 0, {}, None, {}))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_record, rows))
    return file.getvalue()


def _record(row: Row) -> dict[str, object]:
    record: dict[str, object] = {"dataset": row.dataset, "scene": row.scene, "tag": row.tag}
    record |= {"seeds": row.seeds, "seeds_missing": row.wanted - row.seeds}
    for metric in METRICS:
        record |= _numbers(metric.key, row.spreads.get(metric.key))
    for metric in METRICS:
        if metric.paired:
            record |= _numbers(f"{metric.key}_minus_full", (row.differences or {}).get(metric.key))
    return record | {key: row.facts.get(key, "") for key in FACTS}


def _numbers(name: str, spread: Spread | None) -> dict[str, object]:
    spread = spread or Spread(None, None, 0, 0)
    known = {f"{name}_mean": spread.mean, f"{name}_std": spread.std, f"{name}_n": spread.n}
    return {key: "" if value is None else value for key, value in known.items()}


# --- Markdown ---
def markdown_text(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """res_table.md: the table, how to read it, and the notes as a list."""
    head = ["data set", "scene", "tag", "seeds"]
    for metric in METRICS:
        head += [metric.heading] + ([f"{metric.heading} - full"] if metric.paired else [])
    lines = [[*head, *FACTS], ["---"] * (len(head) + len(FACTS)), *map(_markdown_cells, rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\n{READING}\n" + ("\n" if notes else "") + "".join(f"- {note}\n" for note in notes)


def _markdown_cells(row: Row) -> Iterable[str]:
    seeds = str(row.seeds) if row.seeds == row.wanted else f"{row.seeds} of {row.wanted}"
    cells = [row.dataset, row.scene, row.tag, seeds]
    for metric in METRICS:
        cells.append(_cell(row.spreads[metric.key], metric.digits))
        if metric.paired:
            cells.append("" if row.differences is None else _cell(row.differences[metric.key], metric.digits, "+"))
    cells += [row.facts[key] or MISSING for key in FACTS]
    return (text.replace("\\", "\\\\").replace("|", "\\|") for text in cells)


def _cell(spread: Spread, digits: int, sign: str = "") -> str:
    if spread.mean is None:
        return MISSING
    deviation = "" if spread.std is None else f" +- {spread.std:.{digits}f}"
    return f"{spread.mean:{sign}.{digits}f}{deviation}" + ("" if spread.whole else f" ({spread.n} of {spread.wanted})")


# --- LaTeX ---
TEX_PAIRED = "psnr"
TEX_ESCAPES = {c: f"\\{c}" for c in "_%&#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    # Text fonts of the default encoding have other glyphs in these places.
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
}
TEX_HEADINGS = {
    "lpips_alex": r"LPIPS$_\mathrm{alex}$",
    "lpips_vgg": r"LPIPS$_\mathrm{vgg}$",
    "train_seconds": "time (s)",
    "peak_memory_mb": "memory (MB)",
}


def tex(text: str) -> str:
    """Text with all that means something to LaTeX escaped."""
    return "".join(TEX_ESCAPES.get(character, character) for character in text)


def tex_text(tables: Sequence[tuple[Sequence[Row], Sequence[str]]]) -> str:
    r"""res_table.tex: a table for each data set's (rows, notes), to paste or \input; it needs the package booktabs.

    Of the differences only PSNR's fits. The best whole mean of a scene is bold, of times and memories only if all of
    the scene ran on one device. Facts and notes are comments.
    """
    parts = ["% Needs \\usepackage{booktabs}.\n"]
    for rows, notes in tables:
        parts += [_tex_table(rows), *(f"% {note}\n" for note in notes)] if rows else []
    return "".join(parts)


def _tex_table(rows: Sequence[Row]) -> str:
    shown = [m for m in METRICS if any(row.spreads[m.key].n for row in rows)]
    head = ["scene", "strategy"]
    for metric in shown:
        head += [TEX_HEADINGS.get(metric.key, metric.heading)] + ([r"$\Delta$"] if metric.key == TEX_PAIRED else [])
    lines = [r"\begin{table*}", r"\centering\footnotesize\setlength{\tabcolsep}{3pt}", _tex_caption(rows)]
    lines += [rf"\begin{{tabular}}{{ll{'r' * (len(head) - 2)}}}", r"\toprule", " & ".join(head) + r" \\"]
    scene = None
    for row in rows:
        lines += [r"\midrule"] if row.scene != scene else []
        part = f" ({row.seeds}/{row.wanted})" if 0 < row.seeds < row.wanted else ""
        cells = ["" if row.scene == scene else tex(row.scene), tex(row.tag) + part, *_tex_figures(row, rows, shown)]
        facts = "; ".join(f"{key} {row.facts[key] or MISSING}" for key in FACTS)
        lines.append(" & ".join(cells) + rf" \\ % seeds {row.seeds} of {row.wanted}; {facts}")
        scene = row.scene
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""])


def _tex_caption(rows: Sequence[Row]) -> str:
    wanted, dataset = rows[0].wanted, tex(rows[0].dataset)
    over = f"mean $\\pm$ standard deviation over {wanted} seeds" if wanted > 1 else "one seed"
    facts = [
        _same(rows, "n_iters", "{} iterations"),
        _same(rows, "batch_size", "batch {}"),
        _same(rows, "device", "{}"),
    ]
    told = "".join(f", {fact}" for fact in facts if fact)
    partial = any(0 < row.spreads[m.key].n < wanted for row in rows for m in METRICS)
    marked = f" ($k$/{wanted}): of $k$ seeds only." if partial else ""
    return (
        rf"\caption{{Data set {dataset}{told}: {over}. $\Delta$: paired difference to \texttt{{full}} with the same "
        rf"scene and seed. Best of a scene in bold.{marked}}}\label{{tab:{_label(rows[0].dataset)}}}"
    )


def _label(text: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in text)


def _same(rows: Sequence[Row], fact: str, words: str) -> str:
    """The fact in words, if all rows agree on it."""
    known = {row.facts[fact] for row in rows if row.facts[fact]}
    return words.format(tex(known.pop())) if len(known) == 1 else ""


def _tex_figures(row: Row, rows: Sequence[Row], shown: Sequence[Metric]) -> Iterable[str]:
    rivals = [other for other in rows if other.scene == row.scene]
    for metric in shown:
        yield _tex_cell(row.spreads[metric.key], metric.printed, row.seeds, bold=_is_best(row, rivals, metric))
        if metric.key == TEX_PAIRED:
            known = row.differences and row.differences[metric.key]
            yield "--" if known is None else _tex_cell(known, metric.printed, row.seeds, "+")


def _is_best(row: Row, rivals: Sequence[Row], metric: Metric) -> bool:
    """Whether no rival with as many seeds looks better in the digits shown."""
    if not metric.paired and len({rival.facts["device"] for rival in rivals if rival.facts["device"]}) > 1:
        return False
    whole = [rival.spreads[metric.key] for rival in rivals if rival.spreads[metric.key].whole]
    best: Callable = max if metric.more_is_better else min
    own = row.spreads[metric.key]
    return (
        own.whole
        and len(whole) > 1
        and round(own.mean, metric.printed) == best(round(spread.mean, metric.printed) for spread in whole)
    )


def _tex_cell(spread: Spread, digits: int, seeds: int, sign: str = "", bold: bool = False) -> str:
    if spread.mean is None:
        return MISSING
    mean = f"{spread.mean:{sign}.{digits}f}"
    deviation = "" if spread.std is None else rf" \pm {spread.std:.{digits}f}"
    part = "" if spread.n == seeds else f" ({spread.n}/{spread.wanted})"
    mean = rf"\mathbf{{{mean}}}" if bold else mean
    return f"${mean}{deviation}${part}"

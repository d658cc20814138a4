"""Writes the figures under "What was measured" in README.md: `python -m strop.bench.readme --write`.

Every figure comes from a file of bench/results/, as the benches wrote it; they stand between two comments of the page.
Without --write it says whether the page has what the files say.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from strop.bench.bench_step import with_spread
from strop.bench.machine import RESULTS
from strop.bench.sides import gigabytes
from strop.engine.errors import UserError, exit_on_user_error
from strop.engine.evaluation.compare import paired_delta

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- measured: written by python -m strop.bench.readme --write, from bench/results/ -->\n"
END = "<!-- measured: end -->\n"
RECIPES = {  # of the frontier
    "exact": "exact recipe (`make demo`)",
    "recipe": "fast recipe",
    "latent": "exact recipe with a latent judge",
    "latent_recipe": "fast recipe with a latent judge",
}


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Compares the figures of README.md with the files of bench/results/, or writes them."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.readme", description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="write the page anew")
    page = README.read_text(encoding="utf-8")
    made = renewed(page, block(RESULTS))
    if parser.parse_args(argv).write:
        README.write_text(made, encoding="utf-8")
    elif made != page:
        raise UserError(f"{README.name}: its figures are not those of {RESULTS}; run it with --write")


def renewed(page: str, figures: str) -> str:
    """Returns the page with these figures. Raises UserError unless it has the two comments once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise UserError(f"{README.name}: expected {BEGIN.strip()} and then {END.strip()}, each once")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    return f"{before}{BEGIN}{figures}{END}{after}"


def block(results: Path) -> str:
    """Returns the table of all figures in Markdown."""
    rows = list(quality_rows(results))
    for file in sorted(results.glob("*/step-*.json"), key=lambda file: (file.parent.name, file.stem)):
        rows += step_rows(read(file))
    return "\n".join(["| what | result |", "|---|---|", *(f"| {what} | {result} |" for what, result in rows)]) + "\n"


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def quality_rows(results: Path) -> Iterator[tuple[str, str]]:
    """Yields what tinyworld gained: of one run with intervals over prompts, and of RECIPES with every seed."""
    base, tuned = (read(results / "tables" / f"{name}.json") for name in ("base", "spo-42"))
    gained = {name: paired_delta(base["scores"][name], tuned["scores"][name]) for name in ("quality", "alignment")}
    quality, alignment = gained["quality"], gained["alignment"]
    interval = "95% interval {:+.3f} to {:+.3f}"
    yield (
        f"quality of {quality['n']} held-out pictures of tinyworld, SPO, seed {tuned['seed']}",
        f"{quality['base']:.3f} before, {quality['tuned']:.3f} after: {quality['delta']:+.3f}, "
        + interval.format(*quality["ci95"]),
    )
    yield "alignment with their captions", f"{alignment['delta']:+.3f}, {interval.format(*alignment['ci95'])}"
    variants = read(results / "frontier_tinyworld.json")["variants"]
    for name, title in RECIPES.items():
        mean, seeds = variants[name]["mean"], variants[name]["seeds"]
        each = ", ".join(f"{seed['quality']:+.3f}" for seed in seeds.values())
        cost = f"; with {mean['relative']['flop']:.2f} of the exact one's FLOP" if name != "exact" else ""
        what = f"gain in quality on tinyworld, {title}, mean of {len(seeds)} seeds"
        yield what, f"{mean['quality']:+.3f} ({each}), alignment {mean['alignment']:+.3f}{cost}"


def step_rows(record: dict) -> Iterator[tuple[str, str]]:
    """Yields what bench_step measured on one machine, of one recipe."""
    rounds = f"median of {record['rounds']} rounds" if record["rounds"] > 1 else "one round"
    compiled = ", `model.compile`" if record["compile"] else ""
    where = f"`{record['recipe']}` on {record['machine']}, {record['dtype']}{compiled}"
    prompt, run = record["faster_per_prompt"], record["faster_per_run"]
    at = record.get("thresholds", {})  # files of before have none, and no spread
    own = f"{record['threshold']:g}"
    times = lambda side: with_spread(at[own]["rounds"][side]) if own in at else f"{prompt[side]:.2f}x"
    listed = lambda each: ", ".join(f"{side} {text}" for side, text in each.items())
    yield f"{where}: speed of a prompt against the published recipe, {rounds}", listed({s: times(s) for s in prompt})
    for threshold, each in at.items():
        if threshold != own:
            kept = f"{each['kept']['published']:.0%} of the pairs"
            ratios = {side: with_spread(by_round) for side, by_round in each["rounds"].items()}
            yield f"the same at threshold {threshold}, which keeps {kept}", listed(ratios)
    fewer = {side: f"{run[side]:.2f}x" for side in run if run[side] != prompt[side]}
    if fewer:
        yield (
            "of a whole run, for which the fast recipe has fewer prompts: a quality result, shown on tinyworld alone",
            listed(fewer),
        )
    if record["sides"]["exact"]["peak_bytes"]:
        peaks = {side: gigabytes(each["peak_bytes"]) for side, each in record["sides"].items()}
        yield f"peak memory of {where}", listed(peaks)


if __name__ == "__main__":
    main()

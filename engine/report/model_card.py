"""Writes the model card beside a run's LoRA: what it was trained on, what it changed, and how to load it."""

from __future__ import annotations

from pathlib import Path

from ..config.find import DEFAULT
from ..evaluation.cells import markdown_table
from ..user_files import public_name
from .run import Run
from .tables import count, score_rows
from .verdict import verdict

ROLLOUT = {"num_steps": "steps", "k": "k", "guidance": "guidance"}  # keys of the card, and their words
LICENCE = "<!-- Fill in: the licence of this LoRA, which that of the base model may bind. -->"


def write_model_card(run: Run, folder: Path) -> Path:
    """Writes folder/README.md of a finished run, in the form that the Hugging Face hub reads; returns its path."""
    path = folder / "README.md"
    path.write_text(model_card(run), encoding="utf-8")
    return path


def model_card(run: Run) -> str:
    """Returns the card as Markdown; its numbers are those of summary.json."""
    recipe, summary = run.recipe, run.summary
    base = public_name(recipe["model"]["path"])
    lora = Path(summary["paths"]["lora"]).name
    kohya = Path(summary["paths"]["lora_kohya"]).name
    tags = ["stable-diffusion", "text-to-image", "diffusers", "lora", recipe.get("method", DEFAULT)]
    sections = (
        "---\n" + f"base_model: {base}\nlibrary_name: diffusers\ntags: [{', '.join(tags)}]\n" + "---",
        f"# {run.dir.resolve().name}",
        f"A LoRA that was trained with {run.config_class.title}, by strop {summary.get('version')}.",
        f"**{verdict(run).headline}**",
        "![base model above, tuned model below](../before_after.png)",
        "## Figures\n\n" + _scores(run),
        "## Training\n\n" + _training(recipe, summary, base),
        "## Use\n\n" + _use(lora, kohya, base),
        f"## Licence\n\n{LICENCE}",
    )
    return "\n\n".join(sections) + "\n"


def _scores(run: Run) -> str:
    return (
        f"Means over {count(run.summary.get('heldout_prompts'))} prompts that were not trained on, the same noise for "
        "both models.\n\n" + markdown_table(("", "base", "tuned", "change", "95% interval"), score_rows(run))
    )


def _training(recipe: dict, summary: dict, base: str) -> str:
    rollout, optim, lora = recipe.get("rollout", {}), recipe["optim"], recipe["lora"]
    steps = {name: rollout[key] for key, name in ROLLOUT.items() if key in rollout}
    beta = f", beta {optim['beta']:g}" if "beta" in optim else ""
    facts = {
        "base model": base,
        "judge": Path(str(recipe["judge"]["path"]).rstrip("/")).name,
        "prompts": f"{count(summary.get('prompts'))} in {count(summary.get('iterations'))} iterations",
        "preference pairs": count(summary["pairs"]) if summary.get("pairs") else "",
        "optimizer steps": f"{count(summary.get('optimizer_steps'))}, learning rate {optim['lr']:g}{beta}",
        "LoRA": f"rank {lora['rank']} on {', '.join(lora['target_modules'])}",
        "rollout": ", ".join(f"{name} {value:g}" for name, value in steps.items()),
        "seed": str(summary.get("seed")),
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value)


def _use(lora: str, kohya: str, base: str) -> str:
    return (
        "In diffusers:\n\n```python\nfrom diffusers import AutoPipelineForText2Image\n\n"
        f"pipe = AutoPipelineForText2Image.from_pretrained({base!r})\n"
        f'pipe.load_lora_weights("path/to/this/folder", weight_name={lora!r})\n'
        'image = pipe("your prompt").images[0]\n```\n\n'
        f"In ComfyUI, copy `{kohya}` to `models/loras`; in A1111, to `models/Lora`. Its scale is 1."
    )

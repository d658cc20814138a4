"""GenEval's twin on tinyworld: `python -m strop.bench.tinyworld.geneval --out DIR [--lora FOLDER]`.

Tasks, rules and result lines are GenEval's; a shape is a class, and detector.py stands for its networks. No caption of
this world says a number, so that counting is left out and Overall is the mean of five tasks. Nothing here is comparable
with GenEval's own scores.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from strop.bench.tinyworld.detector import Found, detect
from strop.bench.tinyworld.examiners import WEIGHTS
from strop.bench.tinyworld.train_unet import load_pipeline, sample
from strop.bench.tinyworld.training import generator
from strop.bench.tinyworld.world import BACKGROUNDS, Scene, caption, parse, sample_scene
from strop.engine.errors import UserError, exit_on_user_error

TASKS = ("single_object", "two_object", "colors", "position", "color_attr")
TRAINED = Path(__file__).parent / "prompts" / "train.txt"
SLACK, SHARE = 0.1, 0.5  # of a position: off the offset, of both sizes; what is left, of the offset's length
GUIDANCE, STEPS = 5.0, 20


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Samples tinyworld, as it is or with a LoRA, on the twin's prompts, and writes what `strop geneval read` reads."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.tinyworld.geneval", description=main.__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for metadata.jsonl and NAME.jsonl")
    parser.add_argument("--lora", type=Path, help="folder with a LoRA, as a run writes it (default: none)")
    parser.add_argument("--name", help="of the results (default: base, or tuned with --lora)")
    parser.add_argument("--prompts", type=int, default=20, help="of each task (default: 20)")
    parser.add_argument("--images", type=int, default=4, help="of each prompt (default: 4)")
    args = parser.parse_args(argv)
    for name in ("prompts", "images"):
        if not 1 <= getattr(args, name) <= 100:
            raise UserError(f"--{name}: found {getattr(args, name)}, expected 1 to 100")
    if args.lora is not None and not args.lora.is_dir():
        raise UserError(f"--lora: found no folder {args.lora}, expected a folder with a LoRA, such as runs/mine/lora")
    torch.set_num_threads(1)
    rows = metadata(args.prompts)
    lines = drawn(rows, args.images, args.lora)
    name = args.name or ("tuned" if args.lora else "base")
    args.out.mkdir(parents=True, exist_ok=True)
    for file, content in (("metadata", rows), (name, lines)):
        (args.out / f"{file}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in content))
    print(f"strop geneval read {args.out / name}.jsonl --metadata {args.out / 'metadata.jsonl'}")


def drawn(rows: Sequence[Mapping], images: int, lora: Path | None) -> list[dict]:
    """Returns the result lines of `images` images of each row's prompt; lora: its folder, None for the base model."""
    pipe = load_pipeline(WEIGHTS)
    if lora is not None:
        pipe.load_lora_weights(str(lora))
    every = [row for row in rows for _ in range(images)]
    pictures = sample(pipe, [row["prompt"] for row in every], GUIDANCE, generator("geneval/noise"), STEPS)
    return results(pictures, every, images)


def metadata(count: int) -> list[dict]:
    """Returns `count` rows for each of TASKS in the form of GenEval's metadata, always the same ones.

    Their captions are as the world draws them, all different, and none is a training prompt. Objects of a pair differ
    in shape, because a class is a shape.
    """
    rng = generator("geneval/prompts")
    taken = set(TRAINED.read_text().splitlines())
    rows = []
    for tag in TASKS:
        left = count
        while left:
            scene = sample_scene(rng)
            fits = (scene.layout == "single") == (tag in ("single_object", "colors")) and scene.shape_a != scene.shape_b
            if fits and caption(scene) not in taken:
                taken.add(caption(scene))
                rows.append({"tag": tag, "include": asked(scene, tag), "prompt": caption(scene)})
                left -= 1
    return rows


def asked(scene: Scene, tag: str) -> list[dict]:
    """Returns what a task asks of a scene's picture, its `include`; in "position" the second stands to the first."""
    first, second = {"class": scene.shape_a, "count": 1}, {"class": scene.shape_b, "count": 1}
    if tag in ("colors", "color_attr"):
        first, second = first | {"color": scene.colour_a}, second | {"color": scene.colour_b}
    if scene.layout == "single":
        return [first]
    return [second, first | {"position": [scene.layout, 0]}] if tag == "position" else [first, second]


def judge(objects: Sequence[Found], row: Mapping) -> tuple[bool, list[str]]:
    """Returns whether the objects of a picture, the best first, are what a row asks for, and what is wrong.

    The rules are those of GenEval (Ghosh et al., 2023): of each class the first `count` objects alone are looked at,
    all of them must have the colour and stand in the relation, and `exclude` forbids as many of a class as its count.
    """
    reasons, matched = [], []
    for wanted in row["include"]:
        of_class = [one for one in objects if one.shape == wanted["class"]][: wanted["count"]]
        fault = _fault(of_class, wanted, matched)
        reasons += [fault] if fault else []
        matched.append(None if fault else of_class)
    for unwanted in row.get("exclude", []):
        count = sum(one.shape == unwanted["class"] for one in objects)
        if count >= unwanted["count"]:
            reasons.append(f"expected {unwanted['class']}<{unwanted['count']}, found {count}")
    return not reasons, reasons


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Returns how a box (left, top, right, bottom) stands to another: up to two of left of, right of, above, below.

    The offset of the centres loses SLACK of both sizes on each axis; what is left counts from SHARE of its length on.
    """
    offset = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    sizes = [box[i + 2] - box[i] + other[i + 2] - other[i] for i in (0, 1)]
    left = [math.copysign(max(abs(o) - SLACK * s, 0), o) for o, s in zip(offset, sizes, strict=True)]
    if max(map(abs, left)) < 1e-3:
        return set()
    dx, dy = (value / math.hypot(*offset) for value in left)
    named = {"left of": dx < -SHARE, "right of": dx > SHARE, "above": dy < -SHARE, "below": dy > SHARE}
    return {name for name, holds in named.items() if holds}


def results(images: Tensor, rows: Sequence[Mapping], each: int) -> list[dict]:
    """Returns result lines, as GenEval's script writes them, for images (n, 3, 64, 64) of n rows, `each` a prompt."""
    lines = []
    for number, (objects, row) in enumerate(zip(detect(images), rows, strict=True)):
        correct, reasons = judge(objects, row)
        boxes = {}
        for one in objects:
            boxes.setdefault(one.shape, []).append(list(one.box))
        lines.append({
            "filename": f"{number // each:05}/samples/{number % each:04}.png",
            "tag": row["tag"],
            "prompt": row["prompt"],
            "correct": correct,
            "reason": "\n".join(reasons),
            "metadata": json.dumps(row),
            "details": json.dumps(boxes),
        })  # fmt: skip
    return lines


def load(device: str | torch.device) -> Callable[[Tensor, list[str]], dict[str, Tensor]]:
    """Returns examine(images (n, 3, 64, 64) in [-1, 1], prompts) -> {"geneval": (n,), "geneval_objects": (n,)}, 0 or 1.

    "geneval": every object that a caption names is there, in its colour, and both in their relation. "geneval_objects":
    the shapes are there. The work is done on the CPU; examine raises ValueError on a prompt outside the grammar.
    """

    def examine(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        found = detect(images)
        scenes = [parse(prompt) for prompt in prompts]
        whole = [judge(_by_colour(objects), _whole(scene))[0] for objects, scene in zip(found, scenes, strict=True)]
        shapes = [judge(objects, _shapes(scene))[0] for objects, scene in zip(found, scenes, strict=True)]
        scores = {"geneval": whole, "geneval_objects": shapes}
        return {name: torch.tensor(right, dtype=torch.float32, device=device) for name, right in scores.items()}

    return examine


def _fault(of_class: Sequence[Found], wanted: Mapping, matched: Sequence) -> str:
    """Returns what is wrong with the first objects of a class, or nothing."""
    name, count = wanted["class"], wanted["count"]
    if len(of_class) < count:
        return f"expected {name}>={count}, found {len(of_class)}"
    colours = [one.colour for one in of_class]
    if "color" in wanted and colours.count(wanted["color"]) < count:
        seen = ", ".join(f"{colours.count(colour)} {colour}" for colour in BACKGROUNDS if colour in colours)
        return f"expected {wanted['color']} {name}>={count}, found {colours.count(wanted['color'])}; and {seen}"
    if "position" in wanted:
        relation, target = wanted["position"]
        if matched[target] is None:
            return f"no target for {name} to be {relation}"
        for one in of_class:
            for other in matched[target]:
                seen = relations(one.box, other.box)
                if relation not in seen:
                    return f"expected {name} {relation} target, found {' and '.join(sorted(seen))} target"
    return ""


def _by_colour(objects: Sequence[Found]) -> list[Found]:
    """Objects whose class is colour and shape: two circles of a caption are then told apart."""
    return [Found(f"{one.colour} {one.shape}", one.colour, one.box, one.fit) for one in objects]


def _whole(scene: Scene) -> dict:
    named = Scene(
        scene.layout, "", f"{scene.colour_a} {scene.shape_a}", "", shape_b=f"{scene.colour_b} {scene.shape_b}"
    )
    return {"include": asked(named, "position")}


def _shapes(scene: Scene) -> dict:
    shapes = [scene.shape_a, scene.shape_b] if scene.shape_b else [scene.shape_a]
    return {"include": [{"class": shape, "count": shapes.count(shape)} for shape in dict.fromkeys(shapes)]}


if __name__ == "__main__":
    main()

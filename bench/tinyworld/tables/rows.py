"""The rows of the tables: which recipe each is, with which keys changed, for how long, and what the paper reports.

Every row spends what SPO's exact recipe spends, in operations (FLOP) of the whole loop. tflop of a row is its own cost
of an iteration, counted by `python -m strop.bench.tinyworld.tables --count`; iterations follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SPO = "configs/tinyworld.yaml"
ITERATIONS, TFLOP = 14, 0.650  # of SPO's exact recipe: the budget of all
NO_STEP_JUDGE = "runs/judge_spm_no_step"
SEEDS = (42, 43, 44)


@dataclass(frozen=True, slots=True)
class Row:
    """A run to compare: a recipe, the keys that differ from it, and how many iterations the budget buys.

    tflop: 10^12 operations of an iteration. published: the method's name in the paper's main tables. paper: what its
    ablation reports, as text. geneval: whether the twin of GenEval is asked at the end.
    """

    name: str
    title: str
    iterations: int = ITERATIONS
    tflop: float = TFLOP
    changes: tuple[str, ...] = ()
    recipe: str = SPO
    published: str = ""
    paper: str = ""
    geneval: bool = False

    @property
    def share(self) -> float:
        """The part of the budget that the row spends, which is near 1."""
        return self.iterations * self.tflop / (ITERATIONS * TFLOP)

    def with_rate(self, lr: float) -> Row:
        """Returns the row with another learning rate, under a name of its own."""
        return replace(self, name=f"{self.name}-lr{lr:g}", changes=(*self.changes, f"optim.lr={lr:g}"))


def ablation(name: str, title: str, paper: str, cost: tuple[int, float], *changes: str) -> Row:
    """Returns SPO with some keys changed; cost: iterations and the TFLOP of each."""
    return Row(name, title, *cost, changes=changes, paper=paper)


def method(name: str, title: str, published: str, cost: tuple[int, float]) -> Row:
    """Returns another method, by a recipe of its own; cost: as of `ablation`."""
    return Row(name, title, *cost, recipe=f"configs/tinyworld_{name}.yaml", published=published, geneval=True)


def otherwise(row: Row, name: str, title: str, published: str, *changes: str) -> Row:
    """Returns a method once more, with some keys of its recipe changed."""
    return replace(row, name=name, title=title, published=published, changes=(*row.changes, *changes))


SAME = (ITERATIONS, TFLOP)
DEFAULT = Row("spo", "SPO", published="SPO", paper="21.43", geneval=True)
PICKSCORE = ("judge.path=bench/tinyworld/weights/pickscore", "judge.kind=pickscore")
NO_STEP = (f"judge.path={NO_STEP_JUDGE}/judge", "judge.kind=spm_no_step")
BEST = "worse than the default"  # the paper's order where its figure is not at hand
ABLATIONS = {  # by what is changed: the rows beside the default
    "next state (random)": (
        ablation("next_winner", "the winner", "17.87", (15, 0.622), "rollout.next_state=winner"),
        ablation("next_loser", "the loser", "", (14, 0.652), "rollout.next_state=loser"),
    ),
    "judge (step-aware)": (
        ablation("judge_no_step", "without step condition", "", SAME, *NO_STEP),
        ablation("judge_pickscore", "plain PickScore", "20.28", (14, 0.648), *PICKSCORE),
    ),
    "k (4)": (
        ablation("k2", "2", BEST, (28, 0.325), "rollout.k=2"),
        ablation("k8", "8", BEST, (8, 1.204), "rollout.k=8"),
    ),
    "inner steps (1)": (
        ablation("inner2", "2", "", (16, 0.561), "rollout.inner_steps=2"),
        ablation("inner4", "4", "", (17, 0.542), "rollout.inner_steps=4"),
    ),
    "timesteps (0 to 751)": (
        ablation("t999", "0 to 999", BEST, (11, 0.800), "rollout.t_range=[0,999]"),
        ablation("t501", "0 to 501", BEST, (20, 0.449), "rollout.t_range=[0,501]"),
    ),
    "pair (best and worst)": (ablation("pair_random", "two at random", "", (15, 0.604), "rollout.pair=random"),),
    "threshold (0.1)": (
        ablation("threshold0", "0", "", (13, 0.725), "rollout.threshold=0"),
        ablation("threshold03", "0.3", "", (16, 0.577), "rollout.threshold=0.3"),
    ),
}
ABLATED = (DEFAULT, *(row for rows in ABLATIONS.values() for row in rows))
MAPO = method("mapo", "MaPO, beta 0.004", "", (242, 0.038))
METHODS = (
    method("diffusion_dpo", "Diffusion-DPO", "Diffusion-DPO", (182, 0.050)),
    method("d3po", "D3PO", "D3PO", (16, 0.578)),
    method("ddpo", "DDPO", "DDPO", (13, 0.709)),
    otherwise(MAPO, "mapo_beta01", "MaPO", "MaPO", "optim.beta=0.1"),
    MAPO,
    method("gradspo", "GradSPO", "", (13, 0.695)),
    DEFAULT,
)

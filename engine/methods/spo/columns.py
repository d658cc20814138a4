"""The columns that SPO reports: each with its form on the terminal, its curve, and the signs of trouble in it."""

from ...runtime.columns import GRAD_NORM, PROMPTS, SHORT, UNSCORED, Column, Curve, Heatmap, Sign, Trend
from ...runtime.signs import early_rows_empty, ends_above, ends_below, falls_below, late_rows_empty
from ..columns import ACCURACY, MARGIN

COLUMNS = (
    PROMPTS,
    Column(
        "judge",
        heading="judge",
        form="{:.4g}",
        drawn=Curve("Judge's score", "healthy: rises, then levels off"),
        trend=Trend("the judge's score", "up"),
    ),
    Column("pairs", "total", heading="pairs", form="{:,}"),
    UNSCORED,
    Column(
        "kept",
        heading="kept",
        form="{:.0%}",
        drawn=Curve(
            "Pairs kept, of those possible",
            "healthy: above 2%, and more than half of what it was at first",
            percent=True,
            from_zero=True,
        ),
        signs=(
            Sign(
                ends_below(0.02),
                "Only {:.1%} of the possible pairs are kept at the end, so there is hardly anything to learn from: "
                "try a smaller rollout.threshold.",
            ),
            Sign(
                falls_below(0.5),
                "The share of pairs kept has fallen to {:.0%}, less than half of what it was at first: the branches "
                "have become alike to the judge. Compare an earlier checkpoint, or try a smaller optim.lr.",
            ),
        ),
    ),
    Column(
        "pairs_per_t",
        "sum",
        drawn=Heatmap("Pairs kept at each timestep", "healthy: no row stays empty but the last few", "pairs"),
        signs=(
            Sign(
                early_rows_empty(10),
                "No pair was kept at t = {}, although there are pairs at smaller t: the judge sees no differences "
                "there. Look at how it was trained for these timesteps, or leave them out of rollout.t_range.",
                after=SHORT,
            ),
            Sign(
                late_rows_empty,
                "No pair was kept at t = {}, the last steps judged. They add so little noise that branches "
                "hardly differ, and so no two scores are further apart than rollout.threshold asks. That is normal; "
                "without these steps in rollout.t_range a rollout costs less.",
                after=SHORT,
                normal=True,
            ),
        ),
    ),
    Column(
        "loss",
        not_drawn="The loss is left out on purpose: it stays near ln 2 = 0.693 whether a run works or not. Watch the "
        "judge's score instead.",
    ),
    MARGIN,
    ACCURACY,
    Column(
        "clipped",
        heading="clipped",
        form="{:.0%}",
        drawn=Curve("Log-ratios clipped", "healthy: stays below 50%", limit=0.5, percent=True, from_zero=True),
        signs=(
            Sign(
                ends_above(0.5),
                "{:.0%} of the log-ratios are clipped at the end, and a clipped one teaches nothing: try a smaller "
                "optim.lr.",
            ),
        ),
    ),
    GRAD_NORM,
)

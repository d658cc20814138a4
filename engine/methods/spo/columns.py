"""The columns that SPO reports: each with its form on the terminal, its curve, and the signs of trouble in it."""

from ...runtime.columns import GRAD_NORM, PROMPTS, SHORT, UNSCORED, Column, Curve, Heatmap, Sign, Trend
from ...runtime.signs import early_rows_empty, ends_below, falls_below, falls_by, late_rows_empty, of_several, stays_low
from ..columns import ACCURACY, CLIPPED, LOSS, MARGIN, PAIRS

LEAST_AGREEMENT, MOST_FALL = 0.1, 0.2  # of Kendall's tau
COLUMNS = (
    PROMPTS,
    Column(
        "judge",
        heading="judge",
        form="{:.4g}",
        drawn=Curve("Judge's score", "healthy: rises, then levels off"),
        trend=Trend("the judge's score", "up"),
    ),
    PAIRS,
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
    Column("threshold"),
    LOSS,
    MARGIN,
    ACCURACY,
    CLIPPED,
    GRAD_NORM,
)
AGREEMENT = Column(  # of a run with an auditor
    "agreement",
    drawn=Curve(
        "Judge and auditor, Kendall's tau",
        "healthy: above 0.1, and no fall by 0.2",
        limit=LEAST_AGREEMENT,
    ),
    signs=(
        Sign(
            of_several(stays_low(LEAST_AGREEMENT)),
            "The judge and the auditor do not agree: Kendall's tau is {:.2f}. Look at the samples; if the auditor is "
            "right, take another judge or train this one further.",
        ),
        Sign(
            falls_by(MOST_FALL),
            "The judge and the auditor no longer agree as they did: Kendall's tau has fallen by {:.2f}. Look at the "
            "samples, stop earlier, or train the judge further.",
        ),
    ),
)

"""The columns that SPO reports: each with its form on the terminal, its curve, and the signs of trouble in it."""

from ...runtime.columns import GRAD_NORM, PROMPTS, Column, Curve, Heatmap, Sign

COLUMNS = (
    PROMPTS,
    Column(
        "judge",
        heading="judge",
        form="{:.4g}",
        drawn=Curve("Judge's score", "healthy: rises, then levels off"),
        trend="the judge's score",
    ),
    Column("pairs", "total", heading="pairs", form="{:,}"),
    Column(
        "kept",
        heading="kept",
        form="{:.0%}",
        drawn=Curve("Pairs kept, of those possible", "healthy: steady and well above 0", percent=True, from_zero=True),
        signs=(
            Sign(
                lambda share: share < 0.02,
                "Only {:.1%} of the possible pairs are kept at the end, so there is hardly anything to learn from: "
                "try a smaller rollout.threshold.",
            ),
        ),
    ),
    Column(
        "pairs_per_t",
        "sum",
        drawn=Heatmap(
            "Pairs kept at each timestep", "healthy: no row stays empty; the judge sees differences at all t", "pairs"
        ),
    ),
    Column(
        "loss",
        not_drawn="The loss is left out on purpose: it stays near ln 2 = 0.693 whether a run works or not. Watch the "
        "judge's score instead.",
    ),
    Column(
        "margin",
        heading="margin",
        form="{:+.3f}",
        drawn=Curve("Margin, winner over loser", "healthy: above 0 and growing", limit=0.0),
    ),
    Column(
        "accuracy",
        heading="accuracy",
        form="{:.0%}",
        drawn=Curve("Implicit accuracy", "healthy: leaves 50% and stays above", limit=0.5, percent=True),
        signs=(
            Sign(
                lambda accuracy: accuracy < 0.52,
                "Implicit accuracy is {:.0%} at the end, no better than a coin: the policy has hardly taken up the "
                "judge's preferences.",
                after=20,
            ),
        ),
    ),
    Column(
        "clipped",
        heading="clipped",
        form="{:.0%}",
        drawn=Curve("Log-ratios clipped", "healthy: stays below 50%", limit=0.5, percent=True, from_zero=True),
        signs=(
            Sign(
                lambda clipped: clipped > 0.5,
                "{:.0%} of the log-ratios are clipped at the end, and a clipped one teaches nothing: try a smaller "
                "optim.lr.",
            ),
        ),
    ),
    GRAD_NORM,
)

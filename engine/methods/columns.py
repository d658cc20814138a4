"""Columns that several methods report: pairs of a winner and a loser, and what the policy prefers among them."""

from ..runtime.columns import Column, Curve, Sign
from ..runtime.signs import ends_above, stays_low

PAIRS = Column("pairs", "total", heading="pairs", form="{:,}")
LOSS = Column(
    "loss",
    not_drawn="The loss is left out on purpose: it stays near ln 2 = 0.693 whether a run works or not. Watch the "
    "judge's score instead.",
)
MARGIN = Column(
    "margin",
    heading="margin",
    form="{:+.3f}",
    drawn=Curve("Margin, winner over loser", "healthy: rises above 0 and stays there", limit=0.0),
    signs=(
        Sign(
            stays_low(0.0),
            "The margin is {:+.2g}, not above 0: the policy does not prefer the winners more than the reference "
            "does. Try a larger optim.lr or more iterations.",
            after=10,
        ),
    ),
)
ACCURACY = Column(
    "accuracy",
    heading="accuracy",
    form="{:.0%}",
    drawn=Curve("Implicit accuracy", "healthy: leaves 50% and stays above", limit=0.5, percent=True),
    signs=(
        Sign(
            stays_low(0.52),
            "Implicit accuracy is {:.0%}, no better than a coin: the policy has hardly taken up the preferences.",
            after=10,
        ),
    ),
)
CLIPPED = Column(
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
)

"""Columns that several methods report: what the policy prefers among pairs of a winner and a loser."""

from ..runtime.columns import Column, Curve, Sign
from ..runtime.signs import stays_low

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

"""The columns that the training of a judge reports."""

from ...judge.heldout import TIMESTEPS
from ...runtime.columns import GRAD_NORM, PROMPTS, Column, Curve, Sign, Trend
from ...runtime.signs import label_ends_below, labels_fall_back, stays_low

COLUMNS = (
    PROMPTS,
    Column("pairs", "total"),
    Column(
        "loss",
        heading="loss",
        form="{:.4f}",
        drawn=Curve("Loss", "healthy: falls, then levels off", from_zero=True),
        trend=Trend("the loss", "down"),
    ),
    Column(
        "accuracy",
        heading="accuracy",
        form="{:.3f}",
        drawn=Curve("Accuracy on the pairs trained on", "healthy: above 50%", limit=0.5, percent=True),
        signs=(
            Sign(
                stays_low(0.52),
                "Accuracy on the pairs trained on is {:.0%}, no better than a coin: look at the labels, or try another "
                "optim.lr.",
                after=20,
            ),
        ),
    ),
    Column(
        "heldout_accuracy",
        labels=TIMESTEPS,
        heading="t={}",
        form="{:.3f}",
        drawn=Curve(
            "Accuracy on held-out pairs, by timestep",
            "healthy: rises and stays up; well above 50% at small t",
            limit=0.5,
            percent=True,
        ),
        signs=(
            Sign(
                label_ends_below(TIMESTEPS[0], 0.52),
                "Accuracy on held-out pairs at t = 0, where images are clean, ends at {:.0%}, no better than a coin.",
                after=20,
            ),
            Sign(
                labels_fall_back(0.1),
                "Accuracy on held-out pairs, over all timesteps, ends {:.2f} below its best: stop earlier, or try a "
                "smaller optim.lr.",
            ),
        ),
    ),
    GRAD_NORM,
)

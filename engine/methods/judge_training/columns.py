"""The columns that the training of a judge reports."""

from ...judge.heldout import TIMESTEPS
from ...runtime.columns import GRAD_NORM, PROMPTS, Column, Curve

COLUMNS = (
    PROMPTS,
    Column("pairs", "total"),
    Column(
        "loss", heading="loss", form="{:.4f}", drawn=Curve("Loss", "healthy: falls, then levels off", from_zero=True)
    ),
    Column(
        "accuracy",
        heading="accuracy",
        form="{:.3f}",
        drawn=Curve("Accuracy on the pairs trained on", "healthy: above 50%", limit=0.5, percent=True),
    ),
    Column(
        "heldout_accuracy",
        labels=TIMESTEPS,
        heading="t={}",
        form="{:.3f}",
        drawn=Curve(
            "Accuracy on held-out pairs, by timestep", "healthy: rises, most at small t", limit=0.5, percent=True
        ),
    ),
    GRAD_NORM,
)

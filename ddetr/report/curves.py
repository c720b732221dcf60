"""`curves.png`: losses and AP of a run, for those who look at the folder and not at the report."""

from pathlib import Path

from ddetr.report.plots import png_figure
from ddetr.report.run_files import RunFiles


def draw_curves(run: RunFiles) -> Path | None:
    """Losses of the last layer, and AP, AP50, AP75 by step; None where there is no step yet."""
    training, validation = run.training, run.validation
    if not training:
        return None
    path = run.path / "curves.png"
    with png_figure(path, (11, 4)) as figure:
        losses, scores = figure.subplots(1, 2)
        for name in ("loss", "loss_ce", "loss_bbox", "loss_giou"):
            if name in training:
                losses.plot(training["step"], training[name], label=name)
        losses.set(xlabel="step", title="training losses", yscale="log")
        for name in ("AP", "AP50", "AP75"):
            if name in validation:
                scores.plot(validation["step"], validation[name], marker="o", label=name)
        scores.set(xlabel="step", title="validation", ylim=(0, 1))
        for axes in (losses, scores):
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
    return path

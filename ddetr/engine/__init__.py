"""Training: Lightning runs the loop, here is what it does not know.

config.py       the settings of data and optimiser, as dataclasses
optimizer.py    parameter groups and schedule of the recipe
splits.py       settings -> annotations of a split
data.py         annotations -> batches, the same for any number of processes
module.py       one optimisation step, one validation
callbacks.py    progress bar, the run's tables, published checkpoints
reporting.py    the run report after every validation
run.py          the run folder
train.py        `train()`: everything put together
"""

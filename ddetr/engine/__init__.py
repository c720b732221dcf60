"""Training: Lightning runs the loop, here is what it does not know.

config.py       the settings of data and optimiser, as dataclasses
optimizer.py    parameter groups and schedule of the recipe
freeze.py       parts that do not train
splits.py       settings -> annotations of a split
data.py         annotations -> batches, the same for any number of processes
finite.py       where a step stops being finite
bundle.py       what is kept of a step that failed
recorder.py     bad steps are skipped, failed ones recorded
module.py       one optimisation step, one validation
ema.py          moving average of the weights
early_stopping.py   the end of a run whose AP no longer rises
data_wait.py    how long training waits for data
loggers.py      TensorBoard, Weights & Biases, MLflow
callbacks.py    progress bar, the run's tables, published checkpoints
reporting.py    the run report after every validation
run.py          the run folder
preflight.py    a run's set-up tried before its first step: preflight_data.py, preflight_model.py; preflight_causes.py
replay.py       a recorded step computed again
train.py        `train()`: everything put together
"""

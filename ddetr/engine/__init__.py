"""Training: Lightning runs the loop, here is what it does not know.

config.py          the settings of a run
train.py           `train()`: everything put together
prepare.py         what a run settles first: device, folder, data set
fit.py             Lightning's loop and its ways of ending; steps alone, for measurements
step.py            what a step is made of, and the one place where its losses are computed
module.py          one optimisation step, one validation: what Lightning calls
optimizer.py       parameter groups and schedule of the recipe
freeze.py          parts that do not train
ema.py             moving average of the weights
early_stopping.py  the end of a run whose AP no longer rises
compile.py         torch.compile of the forward pass, for a few padded shapes
memory.py          what a step will take, and what to say when it was not enough
batch_size.py      `--device_batch_size auto`
callbacks.py       progress bar, the run's tables, published checkpoints
loggers.py         TensorBoard, Weights & Biases, MLflow
saving.py          a run's state: when it is saved, and stop signals
run_report.py      the run report after every validation
run/               the run folder: tables, states, whose it is, whether its data are the same
loading/           images on their way into the training process
blackbox/          a step that fails
preflight/         what is tried before a long run
"""

"""Images on their way into the training process.

datamodule.py   annotations -> batches, the same for any number of processes
sampler.py      which images an epoch takes, and which run through the network together
workers.py      the processes that load images
data_wait.py    how long training waits for them
"""

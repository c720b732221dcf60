"""What is tried before a long run.

run.py      all checks, their table and their verdict
data.py     targets and evaluation, on the run's own data
model.py    first loss, learning on one batch, gradients
causes.py   the usual mistakes that explain a failed check
"""

"""What is tried before a long run.

run.py      all checks, their table and their verdict
data.py     training images and evaluation, on the run's own data
model.py    first loss, learning on one batch, gradients
"""

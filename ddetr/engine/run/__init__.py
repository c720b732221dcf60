"""What a run has on disk, and what may be done with it.

folder.py   the run folder: which one, how it is found again
states.py   the states to resume from: the newest whole one
tables.py   CSV files that grow by a row at a time
data.py     whether the data are still those that the run began with
lock.py     one process at a time
"""

"""Measurements that anyone can repeat: `ddetr bench ...`.

op.py       `ddetr bench op`: the operator against other implementations
sizes.py    the inputs: named layers of the encoder and the decoder
sides.py    the implementations, ours and others', and why one is not there
growth.py   how the cost grows with queries, points, levels and image size
tables.py   its figures for people
data.py     `ddetr bench data`: the training loader, beside the plain Pillow recipe
plain_recipe.py  that recipe, step by step
data_tables.py   its figures for people
timing.py   interleaved medians: CPU time of the thread, wall time, CUDA events
record.py   machine, commit and command beside every figure, and the files
"""

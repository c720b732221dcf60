"""Measurements that anyone can repeat: `ddetr bench ...`.

op.py       `ddetr bench op`: the operator against other implementations
sizes.py    the inputs: named layers of the encoder and the decoder
sides.py    the implementations, ours and others', and why one is not there
growth.py   how the cost grows with queries, points, levels and image size
tables.py   its figures for people
data.py     `ddetr bench data`: the training loader, beside the plain Pillow recipe
plain_recipe.py  that recipe, step by step
data_tables.py   its figures for people
train.py    `ddetr bench train`: the engine's training step, and the same step by others
stopwatch.py where its time goes; peak.py its memory; step_tables.py its figures for people
official.py that step as the official recipe has it; huggingface.py transformers' network and its step
inference.py  `ddetr bench inference`: the whole detector beside transformers' with the same weights
evaluation.py `ddetr bench evaluation`: COCO's evaluation by each library
matcher.py  `ddetr bench matcher`: the matching beside the official formulation
convergence/ `ddetr bench convergence`: how soon detectors learn, beside others on the same images
gpu/        `ddetr bench gpu`: all of it on a GPU, in minutes
timing.py   interleaved medians: CPU time of the thread, wall time, CUDA events
record.py   machine, commit and command beside every figure, and the files
"""

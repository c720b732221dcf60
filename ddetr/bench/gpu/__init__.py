"""`ddetr bench gpu`: one command that proves and measures everything on a GPU.

command.py  the command: stages one after the other, each in a process of its own with its share of the time
stages.py   the table of stages, and the process of one
sheet.py    what a stage is given and what it writes down
page.py     its figures for people: tables of the terminal, and gpu.md
checks.py   stage 1: doctor, self-test, values and gradients against float64, the memory checker
operator.py stage 2: the operator beside every other one that is there
official.py the official operator, built from its source
sweep.py    stage 3: the kernels' own choices
ideas.py    kernels that are tried there and nowhere else
launch.py   what a call of the operator costs the host
network.py  stage 4: the whole detector, beside transformers'
training.py stage 5: the training step, beside transformers' and the official recipe
runs.py     stage 6: real training runs, killed, starved and poisoned
marked.py   stage 7: the tests marked `gpu`
"""

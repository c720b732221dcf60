"""The command line, `ddetr COMMAND`. [jsonargparse]

main.py       which commands there are, and those of a file each: the signatures of the functions are the interface
training.py   train, preflight and demo
data.py       data audit, show and convert
weights.py    weights show, list, convert and push; --checkpoint and --weights of other commands
bench.py      bench ...
weights.py    weights convert
parser.py     jsonargparse with messages for people
"""

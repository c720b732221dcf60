"""The command line, `ddetr COMMAND`. [jsonargparse]

main.py     the commands: the signatures of the functions are the interface
parser.py   jsonargparse with messages for people
"""

"""What only a GPU can tell.

sweep.py    which cut of the Triton kernels is the fastest, and the table that the kernels' module holds
ideas.py    other kernels for the same work, until a measured gain lets them in there
launch.py   what a call of the operator costs the host
"""

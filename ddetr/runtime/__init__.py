"""The process and its machine: what decides where and how exactly it computes, whatever it computes.

device.py        the one choice of a device
precision.py     the table of precisions; TF32, determinism, oneDNN's products
allocator.py     what the process keeps of freed memory; the CUDA allocator's segments
limits.py        cores, memory, shared memory and open files that this process may use; a container's limits
transfer.py      copies to a GPU that wait for nothing
signals.py       the signals that ask a run to stop
distributed.py   which process this is, and what the processes of a run tell each other
nvidia.py        NVIDIA's kernel module
environment.py   machine and software, beside every run and figure
"""

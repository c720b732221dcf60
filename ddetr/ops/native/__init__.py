"""The CPU kernel: C++ sources, their build, and the ctypes binding. Importing it loads no library."""

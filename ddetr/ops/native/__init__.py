"""The CPU kernel in C++. Importing this loads no library.

build.py     the sources beside it -> the library
library.py   the library, called by ctypes
"""

"""Multi-scale deformable attention: the operator. Needs torch alone; importing it compiles and downloads nothing.

ms_deform_attn.py   the public functions
arguments.py        the check of their arguments
operators.py        the torch.library operator: autograd, fake tensors
backends.py         which back end computes where, DDETR_OPS, and why not another; self_test.py before it is trusted,
                    verified.py what passed before
native/             fused CPU kernels: C++ behind a plain C interface, loaded by ctypes
triton_kernels.py   fused CUDA kernels
embedding_bag.py    stock PyTorch, for machines without the native library
reference.py        plain PyTorch, any device and dtype: the truth, and what exports; corners.py is its gather form
accelerate.py       the operator in models of Hugging Face transformers, and out again
"""

from ddetr.ops.accelerate import accelerate
from ddetr.ops.backends import Backend, backends
from ddetr.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_step

__all__ = ["Backend", "accelerate", "backends", "ms_deform_attn", "ms_deform_attn_step"]

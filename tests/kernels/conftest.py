"""The directory numerics/ runs kernels: on a GPU where there is one, else in a process of the interpreter.

The other files are about the references that CPU tensors take, which the interpreter replaces.
"""

import torch

from kernels.launch import INTERPRETED

if INTERPRETED:
    collect_ignore_glob = ["test_*.py"]
elif not torch.cuda.is_available():
    collect_ignore = ["numerics"]

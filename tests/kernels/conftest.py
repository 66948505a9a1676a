"""The directory numerics/ runs kernels: on a GPU where there is one, else in a process of the interpreter.

The other files are about the references that CPU tensors take, which the interpreter replaces.
"""

import torch

from kernels.launch import INTERPRETED

if INTERPRETED:
    collect_ignore_glob = ["test_*.py"]
    collect_ignore = [
        "test_operators.py",
        "test_fuse.py",
        "test_in_place.py",
        "test_rms_norm.py",
        "test_losses.py",
        "test_embedding_bag.py",
        "test_interaction.py",
        "test_dropout.py",
        "test_add_norm.py",
        "test_fuse_add_norm.py",
    ]
elif not torch.cuda.is_available():
    collect_ignore = ["numerics"]

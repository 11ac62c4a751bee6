"""Firefly for PyTorch.

    import torch.distributed as dist
    dist.init_process_group("ffreduce")        # needs no import of this package (torch >= 2.14)

`install_as("nccl")`, or FIREFLY_INSTALL_AS=nccl,gloo in the environment, serves trainers that spell
another backend's name. `stats()` says what the collectives moved.
"""

__version__ = "0.1.0"
__all__ = ["install_as", "register", "stats"]

from .backend import install_as, register, stats

register()

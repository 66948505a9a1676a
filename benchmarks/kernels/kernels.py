"""All operators that are measured."""

from .attend import ATTENTION
from .norms import DROPOUT, LOSSES, NORMS
from .products import PRODUCTS
from .recommendation import RECOMMENDATION

KERNELS = (*NORMS, *PRODUCTS, *ATTENTION, *RECOMMENDATION, *LOSSES, *DROPOUT)

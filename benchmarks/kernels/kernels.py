"""All operators that are measured."""

from .norms import DROPOUT, LOSSES, NORMS
from .products import PRODUCTS
from .recommendation import RECOMMENDATION

KERNELS = (*NORMS, *PRODUCTS, *RECOMMENDATION, *LOSSES, *DROPOUT)

"""All operators that are measured."""

from .attend import ATTENTION
from .joins import JOINS
from .norms import DROPOUT, LOSSES, NORMS
from .products import PRODUCTS
from .recommendation import RECOMMENDATION

KERNELS = (*NORMS, *PRODUCTS, *JOINS, *ATTENTION, *RECOMMENDATION, *LOSSES, *DROPOUT)

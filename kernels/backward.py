"""Rewrites the halves of a stage's backward, input and weight half alike."""

from torch import fx

from .backward_sums import sum_gradients
from .derivatives import differentiate_in_products
from .in_place import accumulate


def rewrite_backward(module: fx.GraphModule) -> fx.GraphModule:
    """Put into one operator what autograd's formulas, each about one operator, could not. In place."""
    return sum_gradients(accumulate(differentiate_in_products(module)))

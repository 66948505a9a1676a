"""The patterns of ATen nodes that operators of this package can take the place of, one module a kind."""

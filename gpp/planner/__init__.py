"""Planners: a computation graph and a topology to a plan."""

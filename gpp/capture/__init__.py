"""A torch module to a computation graph (GraphPipe §3) and what runs it."""

"""A stage to the functions that its rank executes."""

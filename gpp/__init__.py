"""Graph pipeline parallelism: capture, plan, schedule, simulate and run a network as a DAG of stages."""

"""What the planners reach: their answers, their speed and their quality, in tables.

`python -m benchmarks.planner` runs every section and writes benchmarks/results/planner.json and planner.md.
"""

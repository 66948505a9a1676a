"""Seconds that a whole micro-batch is under way between two stages."""

from gpp.plan import Edge, Plan


def hop_seconds(plan: Plan, edge: Edge) -> tuple[float, float]:
    """From the end of a pass until all of its micro-batch is at the other end: activations, then gradients.

    Messages from one replica to another follow one another; the link between hosts counts if any replicas sit
    in different ones. Stages that share devices hand over at once.
    """
    ends = [plan.stage_graph.stages[s] for s in (edge.source, edge.target)]
    if set(ends[0].devices) == set(ends[1].devices):
        return 0.0, 0.0
    hosts = {plan.topology.host(device) for stage in ends for device in stage.devices}
    link = plan.topology.inside if len(hosts) == 1 else plan.topology.between
    above, below = (stage.micro_batch // len(stage.devices) for stage in ends)
    size = min(above, below)  # of a message; the next one goes to the next replica
    there = -(-above // ends[1].micro_batch) * link.seconds(edge.bytes * size)
    back = -(-below // ends[0].micro_batch) * link.seconds(edge.gradient_bytes * size)
    return there, back

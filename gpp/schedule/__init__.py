"""A plan's work as instructions per rank: order, lowered to messages, checked."""

"""What checkpoints cost: bytes a second on a disk, and the time that a step loses."""

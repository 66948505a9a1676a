"""What executes a schedule: communicators, buffers, the executor, the trainer."""

"""Checkpoints on disk, written so that a crash at any byte leaves the last one whole."""

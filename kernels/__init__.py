"""Fused operators in Triton, one a file: forward, backward, registration, CPU reference."""

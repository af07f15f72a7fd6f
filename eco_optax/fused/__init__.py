"""Fused optimizer steps, each kernel beside the plain function that defines it."""

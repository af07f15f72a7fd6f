"""Optimizers whose whole step on a packed leaf is fused."""

"""Transformations of gradients and states, on packed or float parameters."""

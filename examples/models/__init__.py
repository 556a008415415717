"""Flax linen models of the examples."""

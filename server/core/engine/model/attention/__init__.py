"""Attention of one step: every new token attends to its own sequence, in few calls."""

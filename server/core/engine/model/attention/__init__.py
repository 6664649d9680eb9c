"""Attention of one step: every new token over its own sequence, few calls for all of them."""

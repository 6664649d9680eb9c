"""Measurements of speed and quality; nothing here needs a network."""

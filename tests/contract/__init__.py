"""Strict clients' checks: shapes, raw bytes, errors; the effect and refusal of every parameter."""

"""Overload, faults, hostile input, shutdown: no reply is lost, mixed up or left hanging."""

"""Overload, faults, hostile input, shutdown: nobody's reply is lost, mixed up or left hanging."""

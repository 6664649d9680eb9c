"""What strict clients check: shapes, raw bytes, errors; every parameter's effect and rejection."""

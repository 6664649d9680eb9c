"""Clients of other projects, if installed: pip install -e '.[clients]'."""

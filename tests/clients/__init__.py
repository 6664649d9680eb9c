"""Clients of other projects, where they are installed: pip install -e '.[clients]'."""

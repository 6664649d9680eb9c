"""The page at `/`: a client of the public API like any other. Needs the extra `ui`."""

"""The page at `/`: a client of the public API. Needs the extra `ui`."""

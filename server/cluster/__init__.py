"""The server on many machines: replicas under Ray Serve, behind an entrance."""

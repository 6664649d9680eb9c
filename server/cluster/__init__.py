"""The server on many machines: replicas of it under Ray Serve, behind an entrance."""

"""The server without HTTP: the model's roles, text, and the engine."""

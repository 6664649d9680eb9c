"""The server's inside: prompts, sentiment, replies and the engine. No HTTP in here."""

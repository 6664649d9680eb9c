"""The server's inside, from what it is for to how it computes. No HTTP in here."""

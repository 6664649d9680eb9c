"""The model's two roles: the analyst, which labels texts, and the reply, which gets the label."""

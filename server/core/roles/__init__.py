"""The two roles: the analyst, who labels texts, and the reply that knows the label."""

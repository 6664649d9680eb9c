"""Token ids in, tokens and scores out: checkpoints, sequences, scheduling, the model."""

"""Text for pretraining, as documents and as batches of tokens."""

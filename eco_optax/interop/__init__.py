"""Into and out of the ecosystem: checkpoints of Hugging Face, compressed-tensors, qwix."""

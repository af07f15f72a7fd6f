"""The Flax harness: models, data and a loop that pretrain without master weights."""

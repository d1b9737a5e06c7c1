"""Three objectives on one image encoder: captions predicted, words predicted, or contrastive.

Paper: https://arxiv.org/abs/2103.00020, section 2.3 and Figure 2: for the same zero-shot accuracy a
bag of words needs a third of the language model's pairs, the contrastive objective a quarter of the
bag of words'.
Command: python tools/predictive_study.py --output docs/predictive (three seeds of each objective;
`clip-jax train` makes the contrastive run alone).
Data and model: those of fashion_mnist.py. Not the paper's case in two ways, both in favour of
predicting: a caption is one of ten things under two names in one of eight wordings, so the photo
tells most of what there is to predict; and a batch holds each thing twenty times, which the
contrastive loss takes for different ones.
The prompts name a class as the captions do, with its article: to a model that predicts tokens in
their order, "a photo of dress" is no sentence.
Measured figures, with cost: docs/predictive.md.
"""

from ml_collections import ConfigDict

from clip_jax import config as c


def get_config() -> ConfigDict:
  photos = c.Source(path="data/fashion_mnist", split="train")
  held_out = c.Source(path="data/fashion_mnist", split="test")
  return c.to_config_dict(
    c.Config(
      name="predictive",
      steps=500,
      model=c.Model(
        image=c.Vision(resolution=32, patch=8, stem="convolution", width=128, layers=2, heads=4),
        text=c.Text(context_length=16, vocab_size=1024, width=64, layers=1, heads=2),
        embed_dim=64,
      ),
      data=c.Data(sources=(photos,), batch_pairs=200, tokenizer="train"),
      optimizer=c.Optimizer(learning_rate=2e-3, warmup_steps=50, weight_decay=0.1),
      evaluation=c.Evaluation(
        tasks=(c.Task("Fashion-MNIST", "zero_shot", held_out, "fashion_mnist_captions", 2000),),
      ),
    )
  )

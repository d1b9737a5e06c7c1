"""Retrieval among clip art and stamps with their titles, and zero-shot over the stamps' folders.

Paper: https://arxiv.org/abs/2103.00020, sections 2.3 and E.2 (retrieval), at a very small size.
Data: python tools/prepare_data.py clipart data/clipart (Debian's openclipart-png and -svg,
tuxpaint-stamps-default; 500 pairs held out, 150 of them stamps).
Some 5,500 pairs teach no open vocabulary: expect figures far over chance and far under CLIP's.
Measured figures, with cost: experiments/README.md.
"""

from ml_collections import ConfigDict

from clip_jax import config as c


def get_config() -> ConfigDict:
  def split(name: str) -> c.Source:
    return c.Source(path="data/clipart", split=name)

  return c.to_config_dict(
    c.Config(
      name="clipart",
      steps=800,
      model=c.Model(
        image=c.Vision(resolution=64, patch=16, stem="convolution", width=128, layers=2, heads=4),
        text=c.Text(context_length=32, vocab_size=4000, width=128, layers=1, heads=4),
        embed_dim=128,
      ),
      preprocess=c.Preprocess(train_short_side=72),
      data=c.Data(sources=(split("train"),), batch_pairs=256, tokenizer="train"),
      optimizer=c.Optimizer(learning_rate=1e-3, warmup_steps=100, weight_decay=0.5),
      evaluation=c.Evaluation(
        tasks=(
          c.Task("clip art and stamps", "retrieval", split("test")),
          c.Task("stamps' folders", "zero_shot", split("stamps_test"), "stamps"),
        ),
        every_steps=200,
      ),
      checkpoint=c.Checkpoint(every_steps=200),
    )
  )

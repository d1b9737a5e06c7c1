"""A process that reads batches by two workers until it is killed: `python loading.py`.

What its workers are sent is less than a pipe holds (64 KiB): had they to wait for more of it, they
would end by themselves when it is killed.
"""


def main():  # its workers import this file again: all imports are in here
  import pickle

  import test_pipeline

  from clip_jax.data import pipeline, tokenizer

  config = test_pipeline._with_workers(2)
  config = test_pipeline._replace_data(config, sources=config.data.sources[:1])
  small = tokenizer.train(["a red circle", "a blue square"], 530)
  assert len(pickle.dumps((test_pipeline.SOURCES[:1], small))) < 32_000
  for _ in pipeline.host_batches(config, test_pipeline.SOURCES[:1], small):
    print("a batch", flush=True)


if __name__ == "__main__":
  main()

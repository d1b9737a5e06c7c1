"""A page of what a zero-shot classifier makes of single images, the failures too.

Source: the paper's figure of predictions (appendix A): images at random, the true label with its
probability and rank, the five likeliest classes as their prompts.
"""

from collections.abc import Mapping, Sequence

from clip_jax.evaluation import pages, report, zero_shot


def page(
  result: zero_shot.ZeroShotResult,
  seed: int,
  halves: bool,
  shown: Mapping[str, str] | None = None,
  facts: Mapping[str, str] | None = None,
  notes: Sequence[str] = (),
) -> str:
  """One page of HTML that holds its pictures: an example of `result` a card.

  Args: seed and halves, as `zero_shot.evaluate` drew them with; shown, what a class is called in
    its prompts where that is not its name; facts, what made the figures; notes, in sentences.
  Of several templates, prompts are written out with the first that is more than a name.
  """
  right = sum(example.correct for example in result.examples)
  return pages.render(
    "predictions.html.j2",
    result=result,
    shown=shown or {},
    right=right,
    interval=report.wilson(result.top1, result.n),
    how=_how(result, seed, halves, right),
    facts={**(facts or {}), "seed": str(seed)},
    notes=notes,
  )


def _how(result: zero_shot.ZeroShotResult, seed: int, halves: bool, right: int) -> str:
  """How the images were drawn and what that is worth, in words."""
  count, n = len(result.examples), result.n
  what = f"{count:,} of {n:,} images" if count < n else f"All {n:,} images, in an order"
  if not halves:
    return (
      f"{what} drawn at random with seed {seed}, none chosen by hand: {right:,} of them are right, "
      f"{count - right:,} are wrong."
    )
  return (
    f"{what} drawn at random with seed {seed}, as far as there are so many half of them from those "
    f"that are right and half from those that are wrong ({right:,} and {count - right:,}): they do "
    "not stand for the accuracy."
  )

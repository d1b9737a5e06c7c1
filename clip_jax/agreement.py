"""What must be the same: on all hosts before they train, and in a checkpoint and what goes on
from it.
"""

import contextlib
import hashlib
import json
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from clip_jax import config as config_lib
from clip_jax import hosts
from clip_jax.data import pipeline, records
from clip_jax.data import tokenizer as tokenizer_lib


def of_hosts(
  config: config_lib.Config,
  experiment: pathlib.Path | None,
  sources: Sequence[records.RecordSource],
  held_out: Sequence[records.RecordSource],
  workdir: pathlib.Path,
) -> None:
  """Compares, before the first collective, all that decides what a host computes; makes `workdir`.

  Args: experiment, the file that the config is from; sources and held_out, for training and
    evaluation, in the order of the config.
  Raises: HostsError, on every host alike, naming each difference and who differs; OSError.
  """
  if jax.process_count() == 1:
    return
  facts = {f"config.{name}": value for name, value in flat(config_lib.to_dict(config)).items()}
  for part, opened in (("data.sources", sources), ("evaluation.tasks", held_out)):
    for i, source in enumerate(opened):
      content = json.dumps([source.fingerprint, getattr(source, "classes", ())]).encode()
      facts[f"the data of config.{part}.{i}"] = f"{len(source):,} records, {_sha256(content)}"
  if experiment is not None:
    facts["the experiment file"] = f"{experiment.name}, {_sha256(experiment.read_bytes())}"
  facts["the code of clip_jax"] = _code()
  facts["the version of jax"] = jax.__version__
  token = secrets.token_hex(8)
  workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      stack.callback(_beside(workdir, token).unlink, missing_ok=True)
      _beside(workdir, token).touch()
    mine = {"facts": facts, "workdir": str(workdir), "token": token}
    everyone = [json.loads(text) for text in hosts.gather("facts", json.dumps(mine))]
    shared = _beside(workdir, everyone[0]["token"]).exists()
    blind = [i for i, text in enumerate(hosts.gather("shared", str(shared))) if text == "False"]
  problems = _problems([one["facts"] for one in everyone])
  if blind:
    there, here = (everyone[i]["workdir"] for i in (blind[0], 0))
    problems.insert(
      0,
      f"workdir {there}: host {', '.join(map(str, blind))} does not see what host 0 writes "
      f"{'there' if here == there else f'in {here}'}; give all hosts one shared folder",
    )
  _refuse(problems)


def of_start(tokenizer: tokenizer_lib.Tokenizer, newest_step: int | None) -> None:
  """Compares what every host starts from. Raises: as `of_hosts`."""
  if jax.process_count() == 1:
    return
  step = "none" if newest_step is None else newest_step
  facts = {"the vocabulary": tokenizer.fingerprint, "the newest checkpoint": step}
  _refuse(_problems([json.loads(text) for text in hosts.gather("start", json.dumps(facts))]))


def _beside(workdir: pathlib.Path, token: str) -> pathlib.Path:
  return workdir / f".shared-{token}"


def _code() -> str:
  package = pathlib.Path(__file__).parent
  files = {f.relative_to(package).as_posix(): f for f in package.rglob("*.py")}
  code = [name.encode() + files[name].read_bytes() for name in sorted(files)]
  return _sha256(b"".join(code))


def _sha256(content: bytes) -> str:
  return f"sha256 {hashlib.sha256(content).hexdigest()[:12]}"


def _problems(everyone: Sequence[Mapping[str, Any]]) -> list[str]:
  """A line for each fact in which the hosts differ: which host has what."""
  problems = []
  for name in sorted({name for facts in everyone for name in facts}):
    who: dict[str, list[str]] = {}
    for host, facts in enumerate(everyone):
      who.setdefault(json.dumps(facts.get(name, "not there")), []).append(str(host))
    if len(who) > 1:
      first, *others = (f"{_short(value)} on host {', '.join(who[value])}" for value in who)
      problems.append(f"{name} is {', '.join([*others[:4], first])}")
  return problems


def _refuse(problems: Sequence[str]) -> None:
  if problems:
    more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
    raise hosts.HostsError(
      f"the hosts differ, nothing was trained: {'; '.join(problems[:12])}{more}"
    )


def page(
  config: config_lib.Config,
  sources: Sequence[records.RecordSource],
  tokenizer: tokenizer_lib.Tokenizer,
) -> dict[str, Any]:
  """What a checkpoint says of its run beside the arrays."""
  return {
    "config": config_lib.to_dict(config),
    "data": pipeline.fingerprint(config, sources, tokenizer),
    "tokenizer": "original" if config.data.tokenizer == "original" else tokenizer.to_json(),
  }


# Changing these between a save and a restart changes nothing that training computes.
_FREE = (
  "name", "init", "log_every_steps", "evaluation", "checkpoint", "data.sources", "data.workers",
  "data.threads", "data.prefetch_batches", "data.max_bad_fraction", "data.worker_memory_gib",
)  # fmt: skip


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """The fields in which a checkpoint's run and this one compute different things.

  Args: two pages, as `page` makes them.
  """
  changed = []
  for group in ("config", "data"):
    before, after = flat(saved[group]), flat(now[group])
    for name in sorted(before.keys() | after.keys()):
      free = group == "config" and any(name == f or name.startswith(f + ".") for f in _FREE)
      if not free and before.get(name) != after.get(name):
        was, now_is = (
          _short(repr(side[name])) if name in side else "not there" for side in (before, after)
        )
        changed.append(f"{group}.{name} was {was}, is {now_is}")
  return changed


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": [{"c": 1}]}} -> {"a.b.0.c": 1}; other lists stay values."""
  out: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, list) and value and isinstance(value[0], dict):
      value = dict(enumerate(value))
    nested = isinstance(value, dict)
    out |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
  return out


def _short(text: str) -> str:
  return text if len(text) <= 60 else f"{text[:24]}... ({len(text)} characters)"

"""A folder of WebDataset's tar files, as img2dataset and DataComp write them: one shard each.

Members of the same name up to its first dot are one pair: an image and its caption, a .txt file.
All else in a tar file (img2dataset's .json) is passed over.
"""

import functools
import hashlib
import pathlib

from clip_jax.data import images, records, tables, tar
from clip_jax.data.tables import Rejected
from tools.prepare.jobs import Item, Job, Plan, PrepareError

NAME = "webdataset"
_IMAGES = ("jpg", "jpeg", "png", "webp")
_CAPTION = "txt"
_MAX_CAPTION_BYTES = 1_000_000

_Pair = dict[str, list[tar.Member]]  # by extension; more than one under it is a mistake


def job(root: pathlib.Path) -> Job:
  """The data set of a folder's tar files, in the order of their names, all in the split "train".

  Raises: PrepareError for a folder without any; TarError for one that was cut short; OSError.
  """
  if not root.is_dir():
    raise PrepareError(f"{root}: no such folder of tar files")
  archives = sorted(root.glob("*.tar"))
  if not archives:
    raise PrepareError(f"{root}: no file in it whose name ends in .tar")
  digest = hashlib.sha256()
  for archive in archives:
    tar.check_end(archive)  # all of them, before the hours that reading them may take
    status = archive.stat()
    digest.update(f"{archive.name} {status.st_size} {status.st_mtime_ns}\n".encode())
  return Job(
    name=NAME,
    description=f"pairs of {len(archives):,} tar files of {root.name}",
    licence="not stated",
    source={"tar files": digest.hexdigest()},
    settings={},
    plan=lambda progress: Plan(parts=[functools.partial(_items, path) for path in archives]),
  )


def _items(path: pathlib.Path) -> list[Item]:
  """The pairs of one tar file. Raises: TarError when it cannot be read to its end."""
  pairs: dict[str, _Pair] = {}
  for member in tar.members(path):
    key, extension = tar.sample_of(member.name)
    pairs.setdefault(key, {}).setdefault(extension, []).append(member)
  return [
    Item(f"{path.stem}/{key}", ("train",), functools.partial(_record, path, key, pair))
    for key, pair in pairs.items()
  ]


def _record(path: pathlib.Path, key: str, pair: _Pair) -> records.Record:
  """Reads one pair. Raises: Rejected."""
  kind = next((extension for extension in _IMAGES if extension in pair), None)
  if kind is None:
    raise Rejected("no_image", f"{', '.join(pair) or 'nothing'} and none of {', '.join(_IMAGES)}")
  if _CAPTION not in pair:
    raise Rejected("no_caption", f"no .{_CAPTION} beside .{kind}")
  image = _bytes(path, pair[kind], images.MAX_BYTES)
  try:
    caption = _bytes(path, pair[_CAPTION], _MAX_CAPTION_BYTES).decode()
  except UnicodeDecodeError as error:
    raise Rejected("encoding", f"the caption is not UTF-8 at byte {error.start}") from error
  return records.Record(f"{path.stem}/{key}", image, tuple(tables.captions_of(caption)))


def _bytes(path: pathlib.Path, found: list[tar.Member], most: int) -> bytes:
  if len(found) > 1:
    raise Rejected("repeated", f"{len(found)} members of the name {found[0].name}")
  member = found[0]
  if not member.plain:
    raise Rejected("not_a_file", f"{member.name}: a link or the like, which is never followed")
  if member.size > most:
    raise Rejected("too_large", f"{member.name}: {member.size:,} bytes, over {most:,}")
  with path.open("rb") as file:
    file.seek(member.offset)
    return file.read(member.size)

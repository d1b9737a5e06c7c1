"""Each reader of files, fed with damage: tools/drills/fuzz.py for CLIP_JAX_FUZZ_SECONDS (30)."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def _fuzz(target, row, drill):
  seconds = os.environ.get("CLIP_JAX_FUZZ_SECONDS", "30")
  words = [sys.executable, "-m", "tools.drills.fuzz", target, "--seconds", seconds]
  done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  print(target, found)
  drill(row, executions=found["executions"], crashes=found["crashes"])


def test_images(drill):
  _fuzz("images", 12, drill)


def test_tables(drill):
  _fuzz("tables", 13, drill)


def test_records(drill):
  _fuzz("records", 33, drill)


def test_tar_files(drill):
  _fuzz("tar", 33, drill)


def test_parquet(drill):
  _fuzz("parquet", 33, drill)


def test_archives(drill):
  _fuzz("archives", 33, drill)

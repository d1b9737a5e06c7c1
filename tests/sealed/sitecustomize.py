"""Python imports this by itself from PYTHONPATH: child processes of the tests are sealed."""

import os

import network_seal

if network_seal.NOTES in os.environ:
  network_seal.start()

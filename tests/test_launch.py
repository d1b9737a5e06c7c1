"""A run on a TPU slice, with a stand-in for gcloud."""

import signal
import sys

import pytest
from stand_ins import BUSY, NO_NETWORK, NONE, ONCE, Cloud, nothing_there_then_active, tpu

from tools import launch_tpu, queued_resource


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  return Cloud(tmp_path, monkeypatch)


def test_a_run_from_request_to_deletion(cloud, capsys):
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="running\n0\n0\n0", times=1)
  cloud.answers("run.exit; elif", out="0\n0\n0\n0")
  assert tpu("--spot", "--project", "ours") == 0
  assert cloud.verbs() == ONCE
  create = next(call for call in cloud.calls() if "create" in call)
  for words in ("v5litepod-16", "v2-alpha-tpuv5-lite", "--spot", "--project=ours", "--node-id=b16"):
    assert words in create
  shown = capsys.readouterr().err
  assert all(f"$ gcloud {call}" in shown for call in cloud.calls())
  start = next(call for call in cloud.calls() if "run.pid" in call and "cat > " in call)
  assert "--config experiments/clip_vit_b16.py --workdir runs/b16" in start


def test_preempted_slices_are_asked_for_again(cloud, capsys):
  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("describe", out="ACTIVE", times=1)
  cloud.answers("run.exit; elif", err="connection closed", code=255, times=1)
  cloud.answers("describe", out="SUSPENDED", times=1)
  cloud.answers("describe", out="FAILED", times=1)  # the second one never comes
  cloud.answers("describe", out="ACTIVE")
  cloud.answers("run.exit; elif", out="0")
  assert tpu() == 0
  assert cloud.verbs() == [*ONCE, "create", "delete", *ONCE]
  assert "was lost: another is asked for (2 of 20)" in capsys.readouterr().err


def test_lost_too_often(cloud, capsys):
  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("describe", out="FAILED")
  assert tpu("--restarts", "2") == 2
  assert cloud.verbs() == ["create", "delete"] * 3
  shown = capsys.readouterr().err
  assert "b16 stopped or was lost 3 times; the same command goes on" in shown


@pytest.mark.parametrize(
  ("codes", "verdict"),
  [
    ((0, 0), 0),
    ((75, 75), 75),
    ((0, 75), 75),
    ((75, 2, 75), 2),
    ((137, 75, 0), 137),
    ((), 1),
    ((42, 42), 75),
    ((42, 0), 75),
    ((42, 2), 2),
  ],
)
def test_the_exit_codes_of_all_hosts_make_one(codes, verdict):
  assert launch_tpu.verdict(codes) == verdict


def test_an_unfinished_run_starts_again_on_the_slice_that_is_there(cloud, capsys):
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="75\n75\n75\n75", times=2)
  cloud.answers("run.exit; elif", out="0\n0\n0\n0")
  assert tpu() == 0
  assert cloud.verbs() == ["create", "copy", "install", "start", "start", "start", "delete"]
  shown = capsys.readouterr().err
  assert "b16 stopped unfinished: training starts again on it (2 of 20)" in shown


def test_a_preempted_run_that_saved_goes_on_elsewhere(cloud):
  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("describe", out="ACTIVE", times=1)
  cloud.answers("run.exit; elif", out="75\n75\n75\n75", times=1)
  cloud.answers("describe", out="SUSPENDING", times=1)
  cloud.answers("describe", out="ACTIVE")
  cloud.answers("run.exit; elif", out="0\n0\n0\n0")
  assert tpu("--restarts", "1") == 0
  assert cloud.verbs() == ONCE * 2


def test_unfinished_too_often(cloud, capsys):
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="75")
  assert tpu("--restarts", "2") == 2
  assert cloud.verbs() == ["create", "copy", "install", "start", "start", "start", "delete"]
  assert "the same command goes on from the newest checkpoint" in capsys.readouterr().err


def test_a_host_that_never_ends_costs_the_slice(cloud, monkeypatch, capsys):
  monkeypatch.setattr(launch_tpu, "_LINGERING", 2)
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="75\nrunning\n75\n75", times=3)
  cloud.answers("run.exit; elif", out="0\n0\n0\n0")
  assert tpu() == 0
  assert cloud.verbs() == ONCE * 2
  assert "a host neither trains nor ends" in capsys.readouterr().err


def test_a_host_that_does_not_answer_any_more_costs_the_slice(cloud, capsys):
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="75\n75\n75\n75", times=1)
  cloud.answers("cat > ~/train.sh", times=1)
  failures = launch_tpu._STEP_TRIES
  cloud.answers("cat > ~/train.sh", err="ssh: connect: No route to host", code=255, times=failures)
  cloud.answers("run.exit; elif", err="ssh: connect: No route to host", code=255, times=failures)
  cloud.answers("run.exit; elif", out="0\n0\n0\n0")
  assert tpu() == 0
  first, dead = ["create", "copy", "install", "start"], ["start"] * failures
  assert cloud.verbs() == [*first, *dead, "delete", *first, "delete", *ONCE]
  assert "b16 is there, but gcloud compute tpus tpu-vm ssh ... failed" in capsys.readouterr().err


def test_a_busy_service_costs_nothing(cloud, capsys):
  """Neither in the queue, nor when the request or the deletion comes through unanswered."""
  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("create", err=BUSY, code=1, times=1)
  cloud.answers("create", err="ERROR: (gcloud) ALREADY_EXISTS: Resource b16", code=1)
  cloud.answers("describe", out="WAITING_FOR_RESOURCES", times=1)
  cloud.answers("describe", err=BUSY, code=1, times=3)
  cloud.answers("describe", out="ACTIVE")
  cloud.answers("run.exit; elif", out="0")
  cloud.answers("delete", err=BUSY, code=1, times=1)
  cloud.answers("delete", err=NONE, code=1)
  assert tpu() == 0
  assert cloud.verbs() == ["create", *ONCE, "delete"]
  assert "asked again in 0 s (failure 3)" in capsys.readouterr().err


def test_a_dropped_connection_ends_nothing(cloud):
  """Training goes on, and so does the tool, however often the connection drops."""
  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("describe", out="ACTIVE", times=1)
  cloud.answers("tail -n", err="client_loop: send disconnect: Broken pipe", code=255)
  for _ in range(2):
    cloud.answers("run.exit; elif", err=NO_NETWORK, code=255, times=4)
    cloud.answers("run.exit; elif", out="running", times=1)
    cloud.answers("describe", err=NO_NETWORK, code=1, times=2)
    cloud.answers("describe", out="ACTIVE", times=4)
  cloud.answers("run.exit; elif", out="0")
  assert tpu() == 0
  assert cloud.verbs() == ONCE


def test_when_nothing_answers_any_more_it_tells_what_may_cost_money(cloud, capsys):
  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("describe", out="WAITING_FOR_RESOURCES", times=1)
  cloud.answers("describe", err=NO_NETWORK, code=1)
  cloud.answers("delete", err=NO_NETWORK, code=1)
  assert tpu() == 2
  assert sum("describe" in call for call in cloud.calls()) == 2 + queued_resource._TRIES
  (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
  assert "out of reach; and b16 MAY STILL BE THERE AND COST MONEY" in line
  assert "queued-resources delete b16 --zone=us-west4-a --force --quiet" in line


@pytest.mark.parametrize(
  "said", ["PERMISSION_DENIED: no", "Reauthentication failed", "UNAUTHENTICATED"]
)
def test_what_asking_again_cannot_help_is_told_at_once(cloud, said):
  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("describe", err=f"ERROR: (gcloud) {said}", code=1)
  assert tpu() == 2
  assert [call.split()[3] for call in cloud.calls()] == ["describe", "create", "describe", "delete"]


def test_a_silence_of_an_hour_is_waited_out(monkeypatch, capsys):
  slept = []
  monkeypatch.setattr(queued_resource.time, "sleep", slept.append)
  options = launch_tpu._parser().parse_args(["status", "b16", "--zone", "z"])
  tpu = queued_resource.Slice(options, None)
  for tries in range(1, queued_resource._TRIES):
    tpu.pause(tries, "busy")
  assert slept[:6] == [30, 60, 120, 240, 300, 300]
  assert sum(slept) > 3600


@pytest.mark.parametrize(
  ("said", "remedy"),
  [
    ("ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerZone' exceeded.", "quotas"),
    ("ERROR: (gcloud) There is no more capacity in the zone", "another --zone"),
    ("ERROR: (gcloud) PERMISSION_DENIED: Cloud TPU API has not been used in project", "enable tpu"),
  ],
)
def test_a_refused_request_leaves_nothing(cloud, capsys, said, remedy):
  cloud.answers("describe", err=NONE, code=1)
  cloud.answers("create", err=said, code=1)
  cloud.answers("delete", err=NONE, code=1)
  assert tpu() == 2
  assert cloud.verbs() == ["create", "delete"]
  (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
  assert said.removeprefix("ERROR: ")[:30] in line
  assert remedy in line


def test_without_credentials_nothing_is_requested(cloud, capsys):
  cloud.answers("describe", err="ERROR: You do not currently have an active account", code=1)
  assert tpu() == 2
  assert cloud.verbs() == []
  assert "gcloud auth login" in capsys.readouterr().err


def test_without_a_project_nobody_is_asked_twice(cloud, capsys):
  said = (
    "ERROR: (gcloud.compute.tpus.queued-resources.describe) Error parsing [queued_resource].\n"
    "The [queued_resource] resource is not properly specified.\n"
    "Failed to find attribute [project]. The attribute can be set in the following ways: \n"
    "- provide the argument `--project` on the command line"
  )
  cloud.answers("describe", err=said, code=1)
  assert tpu() == 2
  assert cloud.verbs() == []
  assert "[queued_resource]. No project is chosen: gcloud config set" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["scp", "setup.sh --", "cat > ~/train.sh"])
def test_what_fails_after_the_request_deletes_it(cloud, capsys, step):
  nothing_there_then_active(cloud)
  words = "--command=bash setup.sh" if step.startswith("setup") else step
  cloud.answers(words, err="ERROR: it broke", code=1)
  assert tpu() == 2
  assert cloud.verbs()[-1] == "delete"
  assert "it broke" in capsys.readouterr().err


def test_a_failed_training_is_told_and_deleted(cloud, capsys):
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="75\n2\n75\n75")
  assert tpu() == 2
  assert cloud.verbs()[-1] == "delete"
  assert "training ended with exit code 2" in capsys.readouterr().err


@pytest.fixture
def hangup():
  """SIGHUP is not ignored, though the tests may run under nohup."""
  before = signal.signal(signal.SIGHUP, lambda *_: None)
  yield
  signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_while_waiting_deletes(cloud, capsys, number, hangup):
  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("describe", signalled=int(number), times=1)
  cloud.answers("describe", out="WAITING_FOR_RESOURCES")
  assert tpu() == 130
  assert cloud.verbs() == ["create", "delete"]
  assert "interrupted" in capsys.readouterr().err


def test_a_closed_terminal_deletes(cloud, hangup, monkeypatch):
  """Nothing can be said any more, and a second SIGHUP comes during the deletion."""

  class Closed:
    def write(self, text):
      raise OSError(5, "Input/output error")

    flush = write

  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("describe", signalled=int(signal.SIGHUP), times=1)
  cloud.answers("delete", signalled=int(signal.SIGHUP), times=1)
  monkeypatch.setattr(sys, "stderr", Closed())
  assert tpu() == 130
  assert cloud.verbs() == ["create", "delete", "delete"]


def test_under_nohup_a_closed_terminal_changes_nothing(cloud, hangup):
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("describe", signalled=int(signal.SIGHUP), times=1)
  cloud.answers("describe", out="ACTIVE")
  cloud.answers("run.exit; elif", out="0")
  assert tpu() == 0
  assert cloud.verbs() == ONCE


def test_a_failed_deletion_is_told_with_the_command(cloud, capsys):
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="2")
  cloud.answers("delete", err="ERROR: try again later", code=1)
  assert tpu() == 2
  shown = capsys.readouterr().err
  assert "training ended with exit code 2" in shown
  assert "MAY STILL BE THERE AND COST MONEY" in shown
  by_hand = "gcloud compute tpus queued-resources delete b16 --zone=us-west4-a --force --quiet"
  assert f"Delete it by hand: {by_hand}" in shown


def test_keep_leaves_the_slice_and_tells(cloud, capsys):
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="0")
  assert tpu("--keep") == 0
  assert "delete" not in cloud.verbs()
  assert "is kept AND COSTS MONEY until: gcloud compute" in capsys.readouterr().err


def test_a_slice_that_is_there_is_used(cloud, capsys):
  cloud.answers("describe", out="ACTIVE")
  cloud.answers("run.exit; elif", out="0")
  assert tpu() == 0
  assert cloud.verbs() == ["copy", "install", "start", "delete"]
  said = "b16 is already there: used as it is, and deleted at the end"
  assert said in capsys.readouterr().err


def test_several_slices(cloud):
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="0")
  assert tpu("--slices", "2") == 0
  create = next(call for call in cloud.calls() if "create" in call)
  assert "--node-count=2 --node-prefix=b16" in create
  assert {
    name for call in cloud.calls() for name in ("ssh b16-0", "ssh b16-1") if name in call
  } == {
    "ssh b16-0",
    "ssh b16-1",
  }


def test_a_dry_run_runs_nothing(cloud, capsys):
  assert tpu("--dry-run") == 0
  assert cloud.calls() == []
  shown = capsys.readouterr().err
  for verb in ("create", "describe", "scp", "setup.sh", "tail -n", "delete b16"):
    assert verb in shown

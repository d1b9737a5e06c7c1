"""The drills: each a fault, what is promised then, and the tests that show it.

`make drills` runs them and writes docs/reliability.md.
"""

import dataclasses
from typing import Literal

Part = Literal["F", "N", "Z"]  # on every push; of minutes, now and then; fuzzing
PARTS: tuple[Part, ...] = ("F", "N", "Z")


@dataclasses.dataclass(frozen=True)
class Row:
  """One drill. Its tests are pytest's node ids, without the brackets of parameters."""

  number: int
  area: str
  fault: str
  promise: str
  # Sentences over the numbers that the tests give by the fixture `drill`, and `cases`: how many
  # tests have passed.
  figures: tuple[str, ...]
  F: tuple[str, ...] = ()
  N: tuple[str, ...] = ()
  Z: tuple[str, ...] = ()
  # Of N what takes seconds, for every push: node ids, with brackets where not all parameters do.
  short: tuple[str, ...] = ()

  def tests(self, part: Part) -> tuple[str, ...]:
    return {"F": self.F, "N": self.N, "Z": self.Z}[part]


def _in(file: str, *names: str) -> tuple[str, ...]:
  return tuple(f"tests/{file}.py::{name}" for name in names)


_BY_PHASE = (
  "{compile} compiling, {restore} restoring, {step} in a step, {save} in a save, {evaluation} in "
  "an evaluation, {last_evaluation} in the last one"
)

_DATA = (
  Row(
    1, "data", "the same configuration twice", "the same records and crops at every step",
    ("{steps:,} steps compared, {mismatches} mismatches",),
    F=_in("test_pipeline", "test_two_runs_agree", "test_worker_processes_agree"),
    N=_in("drills/test_data", "test_any_number_of_workers_agrees"),
    short=_in("drills/test_data", "test_any_number_of_workers_agrees[3]"),
  ),
  Row(
    2, "data", "a restart at any step", "the same as without it",
    ("{starts} starts, {mismatches} of {steps:,} steps differ",),
    F=_in("test_pipeline", "test_every_restart_continues"),
  ),
  Row(
    3, "data", "another number of hosts or workers", "the same global batch, in the same order",
    ("{equal} of {batches} batches are equal",),
    F=_in("test_pipeline", "test_any_number_of_hosts_agrees"),
    N=_in("drills/test_data", "test_hosts_by_workers_agree"),
    short=_in("drills/test_data", "test_hosts_by_workers_agree[2-2]"),
  ),
  Row(
    4, "data", "other data, seed, batch, weights or transforms under a checkpoint",
    "refused, the field is named; a flag overrides", ("{named} of {changed} changes are named",),
    F=(
      *_in("test_train", "test_another_run_is_refused_by_field", "test_accepted_changes_go_on"),
      *_in(
        "test_pipeline", "test_the_fingerprint_names_each_change",
        "test_the_fingerprint_sees_the_records_and_the_vocabulary",
      ),
    ),
  ),
  Row(
    5, "data", "records that are damaged or cannot be decoded",
    "another in their place, the same everywhere, counted exactly by cause",
    (
      "{injected} bad records, {counted} counted, of {most_causes} causes",
      "{most_milliseconds:.2f} ms for each bad one, over a good one's",
    ),
    F=(
      *_in("test_pipeline", "test_bad_records_are_replaced_and_counted_exactly"),
      *_in("test_records", "test_bad_records_are_replaced_exactly"),
    ),
    N=_in("drills/test_data", "test_the_cost_of_a_bad_record"),
    short=_in("drills/test_data", "test_the_cost_of_a_bad_record"),
  ),
  Row(
    6, "data", "more bad records than the budget", "the run ends, the first ones are named",
    ("{most_steps} steps until it stopped",),
    F=(
      *_in("test_train", "test_a_shard_of_bad_records_ends_the_run"),
      *_in("test_pipeline", "test_too_many_bad_records_stop_the_run_and_are_named"),
    ),
  ),
  Row(
    7, "data", "a shard cut short, missing, empty, with holes, or with a flipped bit",
    "an error that names file and place; never a shorter epoch without a word. A bit flipped in a "
    "record is found in ArrayRecord, and in Parquet whose pages have checksums; in other Parquet "
    "files and in tar files only if the decoder sees it",
    ("{detected} of {injected} found, {harmless} without effect on any record",),
    F=(
      *_in(
        "test_records", "test_a_missing_or_cut_shard_is_found_at_once",
        "test_a_flipped_bit_is_found_when_it_is_read",
      ),
      *_in(
        "test_tar", "test_a_cut_anywhere_is_an_error_or_does_not_matter",
        "test_a_hole_over_any_header_is_found", "test_what_follows_the_end_is_an_error",
      ),
      *_in("test_parquet_source", "test_flipped_bits_in_checked_pages_are_noticed"),
      *_in("test_tar_source", "test_damaged_folders_are_errors_at_once"),
    ),
    N=_in("drills/test_data", "test_a_bit_flipped_anywhere_in_a_shard"),
    short=_in("drills/test_data", "test_a_bit_flipped_anywhere_in_a_shard"),
  ),
  Row(
    8, "data", "a worker process is killed or crashes", "the run ends within 10 s and names it",
    ("{killed} killed, {most_seconds:.1f} s at most until the run ended",),
    N=_in("drills/test_workers", "test_a_killed_worker_ends_the_run"),
    short=_in("drills/test_workers", "test_a_killed_worker_ends_the_run[SIGKILL]"),
  ),
  Row(
    9, "data", "a worker ends with 0, hangs, or raises what cannot be pickled",
    "the run ends within the stall limit, or the record is replaced",
    ("{modes} kinds, {most_seconds:.1f} s at most, with a stall limit of {most_limit:.0f} s here, "
     "{most_usual:.0f} s in a run",),
    N=_in("drills/test_workers", "test_a_worker_that_grain_would_wait_for"),
  ),
  Row(
    10, "data", "slow storage", "told after 10 s; counted as waiting for data",
    ("{most_share:.0%} of the time waiting for data; told once, with a limit of {most_limit} s "
     "here, {most_usual:.0f} s in a run",),
    F=_in("test_pipeline", "test_slow_storage_is_told_and_counted"),
  ),
  Row(
    11, "data", "hostile and odd images (bombs, 16 bits, CMYK, palettes, EXIF, EPS, HTML)",
    "stated pixels, or a refusal with its cause",
    ("{right} of {images} right; {most_megabytes:.0f} MB of memory for a bomb, at most",),
    F=_in(
      "test_images", "test_good_images_have_their_stated_pixels",
      "test_bad_images_are_refused_by_cause", "test_refusing_a_bomb_takes_no_memory",
    ),
  ),
  Row(
    12, "data", "image files with random damage", "an image, or one kind of exception",
    ("{executions:,} executions, {crashes} crashes",),
    F=_in("test_images", "test_damage_anywhere_gives_an_image_or_an_image_error"),
    Z=_in("drills/test_fuzz", "test_images"),
  ),
  Row(
    13, "data", "bad CSV, JSON lines, UTF-8",
    "an error with file and line, or skipped and counted; no row swallowed",
    ("{rows_in:,} rows in = {rows_out:,} out and skipped", "{executions:,} executions"),
    F=_in(
      "test_prepare_folder", "test_every_bad_row_is_named_with_its_line_and_nothing_is_followed",
      "test_json_lines", "test_as_many_rows_come_out_as_go_in",
      "test_a_table_that_is_wrong_as_a_whole_is_an_error",
    ),
    Z=_in("drills/test_fuzz", "test_tables"),
  ),
  Row(
    14, "data", "a field that holds a URL, `pipe:`, a command, a path outside",
    "never fetched, run or followed", ("{fields} hostile fields read, {attempts} attempts",),
    F=(
      *_in("test_hostile_fields", "test_nothing_in_a_record_is_fetched_run_or_followed"),
      *_in(
        "test_hostile_fields", "test_the_seal_sees_each_way_out",
        "test_a_manifest_names_only_files_beside_it",
      ),
      *_in(
        "test_prepare_webdataset", "test_every_bad_pair_is_named_and_nothing_is_followed"
      ),
    ),
  ),
)  # fmt: skip

_TRAINING = (
  Row(
    15, "training", "one loss or gradient that is not finite",
    "weights and optimizer unchanged, bit for bit; counted",
    ("{leaves} arrays compared, {differing} differ",),
    F=_in("test_train_step", "test_a_step_that_is_not_finite_changes_nothing"),
  ),
  Row(
    16, "training", "ten of them in a row",
    "the run ends, the checkpoint is finite, the step to go on from is named",
    ("{most_steps} steps to the end",),
    F=(
      *_in("test_train", "test_not_finite_for_too_long_ends_the_run"),
      *_in("test_train_step", "test_bad_forever_keeps_the_parameters_finite_and_counts"),
    ),
  ),
  Row(
    17, "training", "a spike of the gradient", "logged; with a limit in the config, skipped",
    ("{true_skips} of {spikes} spikes skipped, {false_skips} of {normal:,} normal steps",),
    F=_in(
      "test_train_step", "test_spikes_are_skipped_and_normal_steps_are_not",
      "test_spikes_are_only_logged_by_default",
      "test_no_spike_is_called_before_the_warm_up_is_over",
    ),
  ),
  Row(
    18, "training", "SIGTERM while restoring, compiling, in a step, an evaluation, a save",
    "one checkpoint, of one step on all hosts; nothing lost; exit code 75",
    (
      "{stops} stops, {lost} steps lost, {most_seconds:.1f} s to exit at most",
      _BY_PHASE + ": of one host and of both",
      "{differing} of {leaves} arrays, {losses_differing} of {losses} losses differ in the end",
    ),
    F=(
      *_in("test_hosts", "test_sigterm_on_one_host_saves_on_all"),
    ),
    N=(
      *_in(
        "drills/test_signals", "test_sigterm_in_each_phase",
        "test_sigterm_to_one_of_two_hosts_that_wait_for_data",
      ),
      *_in("drills/test_phases", "test_sigterm_in_each_phase_of_two_hosts"),
    ),
  ),
  Row(
    19, "training",
    "SIGTERM to the whole process group, with worker processes; kill -9 while these start",
    "as 18; no process is left behind",
    ("{stops} stops, {most_seconds:.1f} s to exit at most; left: {left} processes, {shm} shared "
     "memory; {differing} of {leaves} arrays differ in the end",
     "{kills} kills while workers start, the last of which ended {most_gone_seconds:.1f} s later"),
    N=(
      *_in("drills/test_signals", "test_sigterm_to_the_group"),
      *_in("drills/test_workers", "test_a_trainer_killed_while_its_workers_start"),
    ),
  ),
  Row(
    20, "training", "two preemptions", "bit for bit what an undisturbed run ends with",
    (
      "{runs} runs, {differing} of {leaves} arrays, {losses_differing} of {losses} losses differ",
      "{most_back_seconds:.0f} s from the signal to the next step, at most",
      "a save of {most_save_bytes:,} bytes holds the loop for {most_save_milliseconds:.0f} ms",
    ),
    F=_in("test_train", "test_killed_twice_and_stopped_and_resumed_is_bit_for_bit_the_same"),
    N=_in("drills/test_end_to_end", "test_preempted_twice"),
  ),
  Row(
    21, "training", "kill -9 of all processes, twice, and in each phase",
    "the same; lost is at most what came after the newest checkpoint",
    (
      "{runs} runs, {differing} of {leaves} arrays, {losses_differing} of {losses} losses differ",
      "{redone} steps done again; {most_back_seconds:.0f} s to the next step, at most",
      "{kills} more kills: " + _BY_PHASE,
    ),
    N=(
      *_in("drills/test_end_to_end", "test_killed_twice"),
      *_in("drills/test_phases", "test_all_hosts_killed_in_each_phase"),
    ),
  ),
  Row(
    22, "training", "other hosts and devices at each start",
    "the same data; weights within 1e-6 after 60 steps, but for the biases of keys: these change "
    "no output, their gradient is rounding alone, and Adam makes it as large as any",
    ("2x2, 1x4, 2x1: largest difference of a weight {most_difference:.1e}, of a loss "
     "{most_loss_difference:.1e}, of a key's bias {most_key_bias:.1e}",),
    F=_in("test_hosts", "test_other_processes_and_another_mesh_go_on"),
    N=_in("drills/test_end_to_end", "test_another_topology_at_each_start"),
  ),
)  # fmt: skip

_CHECKPOINTS = (
  Row(
    23, "checkpoints", "kill -9 at a random moment of a save",
    "the step before is there, bit for bit; nothing to clean up; the step can be saved again",
    ("{kills} kills, {partial} left a partial folder; {restored} restored exactly, {lost} lost",),
    N=_in("drills/test_damage", "test_killed_at_a_random_moment_of_a_save"),
    short=_in("drills/test_damage", "test_killed_at_a_random_moment_of_a_save[5]"),
  ),
  Row(
    24, "checkpoints", "partial copies, empty folders, missing commit files, junk",
    "passed over with a warning", ("{folders} kinds of them",),
    F=_in(
      "test_checkpoint", "test_partial_folders_are_passed_over",
      "test_facts_that_cannot_be_read_are_passed_over",
    ),
  ),
  Row(
    25, "checkpoints", "a flipped bit or a hole in the data",
    "found; the leaf is named; the step before is taken",
    ("{detected} of {injected} found, {by_checksum} of them by the checksums alone; {harmless} "
     "without effect",
     "{fallen_back} in the part of one of two hosts: both fell back, {differing} of {leaves} "
     "arrays differ in the end"),
    F=_in(
      "test_checkpoint", "test_damaged_data_is_not_trained_on", "test_a_changed_fact_is_damage",
      "test_what_another_host_cannot_read_is_not_used",
      "test_the_first_host_alone_sets_aside_and_all_hear_that_it_cannot",
    ),
    N=_in(
      "drills/test_damage", "test_a_bit_flipped_anywhere_in_a_checkpoint",
      "test_damage_that_one_of_two_hosts_meets",
    ),
    short=_in("drills/test_damage", "test_a_bit_flipped_anywhere_in_a_checkpoint[zarr2]"),
  ),
  Row(
    26, "checkpoints", "a full disk in a background save",
    "an error by the next step; the step is not listed; the last good one is kept",
    ("{most_seconds:.2f} s until told, {phantoms} phantom steps",),
    F=_in("test_checkpoint", "test_a_full_disk_is_told_and_leaves_the_last_good_step"),
  ),
  Row(
    27, "checkpoints", "restored on another mesh", "bit for bit",
    ("{exact} of {pairs} pairs exact",),
    F=_in("test_checkpoint", "test_restores_on_another_mesh"),
  ),
  Row(
    28, "checkpoints", "another optimizer, shape, dtype or set of parameters",
    "refused, leaves are named; weights alone can be asked for", ("{cases} cases",),
    F=_in(
      "test_checkpoint", "test_another_model_is_refused_by_leaf", "test_weights_alone_can_be_read"
    ),
  ),
  Row(
    29, "checkpoints", "one that an earlier release wrote",
    "it restores, or its version is named with what to do",
    ("{versions} kept versions read, exactly",),
    F=_in(
      "test_releases", "test_a_kept_checkpoint_is_read", "test_training_goes_on_from_it",
      "test_a_later_format_is_refused_with_advice",
    ),
  ),
)  # fmt: skip

_HOSTS = (
  Row(
    30, "hosts", "one of them is killed, in any phase",
    "all others end with 75, within twice the heartbeat, and name it; the same command goes on",
    (
      "{deaths} deaths, {most_seconds:.1f} s at most with a heartbeat of {most_heartbeat:.0f} s",
      _BY_PHASE + "; {redone} steps done again, {differing} of {leaves} arrays, {losses_differing} "
      "of {losses} losses differ in the end",
    ),
    F=_in(
      "test_hosts", "test_one_host_of_four_dies_and_what_they_saved_loads_in_one",
      "test_a_coordinator_that_dies_is_named_and_ends_the_others",
    ),
    N=_in("drills/test_phases", "test_one_host_killed_in_each_phase"),
  ),
  Row(
    31, "hosts", "one of them lives but hangs",
    "it shows its stacks and ends with 42 within the limit, and who waits for it ends too, with 42 "
    "or, where the other was quicker, 75; nothing is left behind. One that is stopped as a whole "
    "counts as dead, as in 30",
    (
      "{stuck} stuck (in a run of two; a process alone), {shown} processes showed their stacks; "
      "{stopped} stopped as a whole",
      "{most_seconds:.1f} s with a limit of {most_limit:.0f} s; {left} processes, {shm} shared "
      "memory left",
    ),
    F=(
      *_in("test_hosts", "test_a_host_that_hangs_is_named_and_ends_the_others"),
      *_in("test_watchdog", "test_a_stuck_process_shows_its_stacks_and_ends"),
    ),
    N=_in("drills/test_signals", "test_a_stuck_host_ends_all"),
  ),
  Row(
    32, "hosts", "they disagree (config, code, data, vocabulary, step)",
    "refused before the first step, each difference named", ("{named} of {fields} named",),
    F=(
      *_in("test_hosts", "test_hosts_that_differ_do_not_start"),
      *_in(
        "test_agreement", "test_another_vocabulary_or_start", "test_other_records_under_one_config"
      ),
    ),
  ),
)  # fmt: skip

_REST = (
  Row(
    33, "weights", "malicious or malformed .pt, TorchScript, safetensors, npz",
    "nothing is executed or over-allocated; an error in one line; what is good comes back exactly",
    (
      "{payloads} payloads, {run} ran", "{executions:,} executions, {crashes} crashes",
      "largest logit difference from open_clip's {most_logit_difference:.1e}",
      "{round_trips} round trips, {differing} arrays differ",
    ),
    F=(
      *_in(
        "test_archive", "test_a_pickle_that_calls_is_refused_by_name", "test_tensors_out_of_bounds",
        "test_archives_that_are_odd", "test_pickles_that_are_odd", "test_safetensors_that_are_odd",
        "test_npz", "test_mutated_files_are_read_or_refused",
        "test_any_sequence_of_allowed_opcodes_ends",
      ),
      *_in("test_weights", "test_embeddings_and_logits_equal_open_clips",
           "test_round_trips_are_exact"),
    ),
    Z=_in("drills/test_fuzz", "test_archives", "test_records", "test_tar_files", "test_parquet"),
  ),
  Row(
    34, "evaluation", "a size that does not divide, other batches or devices, NaN, a bad image",
    "every sample counts once, the same figures for all layouts; NaN or a bad image is an error",
    ("{counted:,} of {expected:,} samples counted; spread of the metrics {most_spread}",
     "{cases} cases"),
    F=(
      *_in("test_layouts", "test_every_layout_gives_the_same_figures"),
      *_in(
        "test_zero_shot", "test_figures_are_those_of_scikit_learn",
        "test_the_batch_size_changes_nothing",
        "test_an_embedding_that_is_not_finite_fails_and_names_the_record",
        "test_a_bad_image_fails_and_names_the_record",
      ),
      *_in(
        "test_retrieval", "test_recalls_are_those_of_brute_force",
        "test_the_batch_size_changes_nothing", "test_embeddings_that_are_not_finite_are_named",
      ),
      *_in("test_hosts", "test_two_hosts_evaluate_as_one"),
    ),
  ),
)  # fmt: skip

ROWS = (*_DATA, *_TRAINING, *_CHECKPOINTS, *_HOSTS, *_REST)

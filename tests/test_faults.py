"""Faults: what the user sees when something breaks, and what is kept.

They are real ones: flipped bytes, full disks, signals. README.md lists them.
"""
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import cifar10_train
from conftest import (
    ROOT, TINY, contents, finish, is_one_line, newest_step, printed_steps, tf,
    wait_until)

DATA, INDEX = 'model.ckpt-11.data-00000-of-00001', 'model.ckpt-11.index'


@pytest.fixture
def in_step(monkeypatch):
  """Function that has another one called before a step of a training."""
  functions = {}
  before_run = cifar10_train.LoggerHook.before_run

  def before_each_run(self, run_context):
    self.runs = getattr(self, 'runs', 0) + 1
    functions.get(self.runs, int)()
    return before_run(self, run_context)

  monkeypatch.setattr(cifar10_train.LoggerHook, 'before_run', before_each_run)
  return functions.__setitem__


@pytest.fixture
def command(synthetic_dir, tmp_path):
  """The path and flags of a script that trains in tmp_path / 'run'."""
  return [str(ROOT / 'cifar10_train.py'), '--dataset=synthetic',
          f'--data_dir={synthetic_dir}', '--batch_size=8',
          f'--train_dir={tmp_path / "run"}', '--log_frequency=1']


# Checkpoints and their folder.


def flip(path, position):
  """Flips a bit in a file, at a position between 0 and 1."""
  content = bytearray(path.read_bytes())
  content[int(position * len(content))] ^= 0x10
  path.write_bytes(content)


def save(folder, step, **variables):
  """Writes a checkpoint of some variables."""
  with tf.Graph().as_default(), tf.Session() as session:
    for name, value in variables.items():
      tf.get_variable(name.replace('__', '/'), initializer=value)
    session.run(tf.global_variables_initializer())
    tf.train.Saver().save(
        session, str(folder / 'model.ckpt'), step, write_state=False)


DAMAGE = {
    'data are cut': lambda run: os.truncate(run / DATA, 9999),
    'data are gone': lambda run: (run / DATA).unlink(),
    'index is empty': lambda run: os.truncate(run / INDEX, 0),
    'a value is not finite': lambda run: save(
        run, 11, conv1__biases=np.float32([1, np.nan])),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_damaged_newest_checkpoint_is_skipped_with_a_line(
    run_dir, capsys, damage):
  DAMAGE[damage](run_dir)
  before = contents(run_dir)
  found = cifar10_train.latest_checkpoint(str(run_dir))
  assert found == str(run_dir / 'model.ckpt-0')
  line, = capsys.readouterr().err.splitlines()
  assert f'{run_dir / "model.ckpt-11"} is damaged' in line
  assert contents(run_dir) == before


def test_no_flipped_byte_escapes(run_dir):
  random = np.random.default_rng(0)
  for name in DATA, INDEX:
    sound = (run_dir / name).read_bytes()
    # The last bytes of an index mean nothing to TensorFlow.
    for position in random.uniform(high=0.9, size=25):
      flip(run_dir / name, position)
      found = cifar10_train.latest_checkpoint(str(run_dir))
      assert found.endswith('-0'), (name, position)
      (run_dir / name).write_bytes(sound)
  assert cifar10_train.latest_checkpoint(str(run_dir)).endswith('-11')


def test_training_and_evaluation_skip_a_damaged_checkpoint(
    train, evaluate, run_dir):
  flip(run_dir / DATA, 0.5)
  for run in evaluate('--run_once', '--num_examples=8'), train('--max_steps=2'):
    assert run.code == 0
    assert run.stderr.startswith(f'{run_dir / "model.ckpt-11"} is damaged')
    assert 'at step 0\n' in run.stdout or printed_steps(run.stdout) == [0, 1]


def test_run_with_only_damaged_checkpoints_is_refused(train, run_dir):
  for path in run_dir.glob('*.index'):
    os.truncate(path, 10)
  before = contents(run_dir)
  run = train('--max_steps=12')
  assert run.code == 1 and '--overwrite' in run.stderr.splitlines()[-1]
  assert contents(run_dir) == before
  assert train('--max_steps=1', '--overwrite').code == 0


def test_checkpoints_of_another_run_are_left_alone(train, run_dir, tmp_path):
  other = shutil.copytree(run_dir, tmp_path / 'other')
  (run_dir / 'checkpoint').write_text(
      f'model_checkpoint_path: "{other}/model.ckpt-11"\n'
      f'all_model_checkpoint_paths: "{other}/model.ckpt-11"\n')
  before = contents(other)
  run = train('--max_steps=12', '--max_to_keep=1')
  assert (run.code, run.stderr, printed_steps(run.stdout)) == (0, '', [11])
  assert list(cifar10_train.checkpoints(str(run_dir))) == [12]
  assert contents(other) == before


def test_checkpoint_that_does_not_fit_is_one_line(train, tmp_path):
  folder = tmp_path / 'run'
  folder.mkdir()
  save(folder, 3, global_step=np.int64(3),
       conv1__weights=np.zeros([3, 3, 3, 32], np.float32))
  before = contents(folder)
  run = train('--max_steps=9')
  assert is_one_line(run, folder / 'model.ckpt-3', 'does not fit')
  assert contents(folder).items() >= before.items()


def test_second_trainer_in_a_folder_is_refused(train, run_dir):
  before = contents(run_dir)
  with cifar10_train.locked(str(run_dir)):
    for flag in '--overwrite', '--max_steps=12':
      assert is_one_line(train(flag), f'--train_dir={run_dir}')
  assert contents(run_dir) == before
  assert train('--max_steps=12').code == 0


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 16 MB for the run: too small for two checkpoints."""
  folder = tmp_path / 'run'
  folder.mkdir()
  mounted = subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', 'size=16m', 'none', str(folder)],
      stderr=subprocess.DEVNULL)
  if mounted.returncode:
    pytest.skip('only root may mount a file system')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


def test_full_disk_costs_no_earlier_checkpoint(train, small_disk):
  run = train('--max_steps=2')
  assert is_one_line(run, 'No space left on device')
  assert printed_steps(run.stdout) == [0, 1]
  assert cifar10_train.latest_checkpoint(str(small_disk)).endswith('-0')
  subprocess.run(
      ['mount', '-o', 'remount,size=50m', str(small_disk)], check=True)
  run = train('--max_steps=2')
  assert (run.code, run.stderr, newest_step(small_disk)) == (0, '', 2)


def test_read_only_folder_is_one_line_before_training(train, small_disk):
  subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
  run = train()
  assert is_one_line(run, small_disk, 'Read-only') and run.stdout == ''


# Signals, consoles, systems and data.


def test_killed_run_continues_at_the_saved_step(
    start_script, command, train, tmp_path):
  folder = tmp_path / 'run'
  process = start_script(*command, '--save_checkpoint_secs=1')
  wait_until(process, lambda: newest_step(folder))
  process.kill()
  finish(process)
  saved, files = newest_step(folder), contents(folder)
  run = train(f'--max_steps={saved + 2}')
  assert (run.code, printed_steps(run.stdout)) == (0, [saved, saved + 1])
  kept = {name for name in files if name.startswith(
      ('events', f'model.ckpt-{saved}.')) and 'temp' not in name}
  assert len(kept) > 2 and kept <= set(contents(folder))


@pytest.mark.parametrize('signum, code', [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signal_saves_the_step_it_came_in_and_ends_training(
    train, in_step, tmp_path, signum, code):
  in_step(3, lambda: os.kill(os.getpid(), signum))
  run = train('--max_steps=9')
  assert (run.code, run.stderr) == (code, '')
  assert signum.name in run.stdout.splitlines()[-1]
  assert newest_step(tmp_path / 'run') == 3


def test_hangup_that_nohup_ignores_stays_ignored(train, in_step):
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  in_step(2, lambda: os.kill(os.getpid(), signal.SIGHUP))
  assert train('--max_steps=3').code == 0


def test_second_signal_ends_the_process_at_once(
    start_script, command, tmp_path):
  script = tmp_path / 'impatient.py'
  script.write_text(textwrap.dedent(f'''\
      import os, signal, sys, time
      sys.path.insert(0, {str(ROOT)!r})
      import cifar10_train
      def before_run(self, run_context):
        for _ in range(9):
          os.kill(os.getpid(), signal.SIGTERM)
          time.sleep(0.1)
      cifar10_train.LoggerHook.before_run = before_run
      cifar10_train.main()
      '''))
  run = finish(start_script(str(script), *command[1:]))
  assert (run.code, newest_step(tmp_path / 'run')) == (-signal.SIGTERM, 0)


def test_script_without_jax_locks_and_sighup_calls_both_mains(
    start_script, command, tmp_path):
  script = tmp_path / 'reader.py'
  script.write_text(textwrap.dedent(f'''\
      import signal, sys
      sys.path.insert(0, {str(ROOT)!r})
      sys.modules['jax'] = sys.modules['fcntl'] = None
      del signal.SIGHUP  # Windows has neither locks nor this signal.
      import cifar10_eval
      import cifar10_train
      cifar10_train.main()
      cifar10_eval.main()
      '''))
  run = finish(start_script(
      str(script), *command[1:], f'--checkpoint_dir={tmp_path / "run"}',
      '--max_steps=1', '--num_examples=8', KERAS_BACKEND='jax'))
  assert run.code == 0, run.stderr
  assert printed_steps(run.stdout) == [0]
  assert '/8 correct at step 1\n' in run.stdout


def test_folder_may_have_any_name_on_an_ascii_console(
    start_script, command, tmp_path):
  folder = tmp_path / "it's 100% {x} $HOME h\u00e4user \u4f60\u597d"
  run = finish(start_script(
      *command, f'--train_dir={folder}', '--max_steps=1',
      PYTHONIOENCODING='ascii'))
  assert (run.code, run.stderr, newest_step(folder)) == (0, '', 1)
  assert 'h\\xe4user \\u4f60' in run.stdout


def test_pipe_that_nobody_reads_does_not_end_training(command, tmp_path):
  process = subprocess.Popen(
      [sys.executable, *command, '--max_steps=9'], stdout=subprocess.PIPE)
  process.stdout.close()
  assert process.wait(timeout=120) == 0
  assert newest_step(tmp_path / 'run') == 9


def test_data_file_that_vanishes_during_training_is_named(
    tiny_dir, train, in_step, tmp_path):
  own_data = shutil.copytree(tiny_dir, tmp_path / 'data') / TINY.folder
  in_step(3, (own_data / 'second.bin').unlink)
  run = train(f'--data_dir={tmp_path / "data"}')
  assert is_one_line(run, own_data / 'second.bin')
  assert cifar10_train.latest_checkpoint(str(tmp_path / 'run'))


def test_every_fault_in_the_table_has_its_test():
  tests = pathlib.Path(__file__).parent
  defined = {name for path in tests.glob('test_*.py') for name in re.findall(
      r'^def (test_\w+)', path.read_text(), re.MULTILINE)}
  rows = [line for line in (tests / 'README.md').read_text().splitlines()
          if ' | ' in line][2:]
  assert 30 <= len(rows) <= 40
  assert [row for row in rows
          if row.split('| ')[-1].strip('`') not in defined] == []

"""Faults: what a run loses when something breaks, and what its owner is told.

The faults are real ones: bytes that are flipped on the disk, a disk that is
full, signals, files that shrink under a running training. tests/README.md lists
them with what the user sees.
"""
import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import cifar10
import cifar10_eval
import cifar10_train
from cifar10_input import UserError, tf


@pytest.fixture
def in_step(monkeypatch):
  """Function that has another one called before a step of a training."""
  functions = {}

  class StopHook(cifar10_train.StopHook):
    steps = 0

    def before_run(self, run_context):
      self.steps += 1
      self._next_check = 0  # Looks around in each step, not once a second.
      functions.get(self.steps, int)()

  monkeypatch.setattr(cifar10_train, 'StopHook', StopHook)
  return functions.__setitem__


@pytest.fixture
def train(use_tiny, call_script, tmp_path):
  """Function that trains in tmp_path / 'run'."""
  return lambda *flags: call_script(
      cifar10_train.main, '--train_dir=%s' % (tmp_path / 'run'),
      '--log_frequency=1', *flags)


@pytest.fixture
def run_dir(trained, tmp_path):
  """A train_dir with checkpoints of the steps 0 and 11."""
  run_dir = shutil.copytree(trained.train_dir, tmp_path / 'run')
  (run_dir / 'run.json').unlink()  # That says where the data lie.
  return run_dir


def _first_step(run):
  return int(re.search(r': step (\d+),', run.stdout)[1])


def _is_one_line(run, *parts):
  """Whether a run failed as a user's mistake does, naming the parts."""
  return (run.code == 1 and run.stderr.count('\n') == 1
          and all(str(part) in run.stderr for part in parts))


def _contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


# Damaged checkpoints.


def _flip(path, position):
  content = bytearray(path.read_bytes())
  content[int(position * len(content))] ^= 0x10
  path.write_bytes(content)


DAMAGE = {
    'cut': lambda path: os.truncate(path, path.stat().st_size // 2),
    'one byte short': lambda path: os.truncate(path, path.stat().st_size - 1),
    'empty': lambda path: os.truncate(path, 0),
    'first byte flipped': lambda path: _flip(path, 0),
    'middle byte flipped': lambda path: _flip(path, 0.5),
    'last byte flipped': lambda path: _flip(path, 0.9999999),
}

DATA, INDEX = 'model.ckpt-11.data-00000-of-00001', 'model.ckpt-11.index'


@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('name', [DATA, INDEX])
def test_damaged_newest_checkpoint_gives_way_to_the_one_before(
    train, run_dir, name, damage):
  DAMAGE[damage](run_dir / name)
  run = train('--max_steps=2')
  assert run.code == 0
  assert 'Continuing from %s' % (run_dir / 'model.ckpt-0') in run.stdout
  assert _first_step(run) == 0
  warning, = run.stderr.splitlines()
  assert '%s is damaged' % (run_dir / 'model.ckpt-11') in warning
  assert (run_dir / name).exists()


def test_checkpoint_whose_data_is_gone_gives_way_to_the_one_before(
    train, run_dir):
  (run_dir / DATA).unlink()
  run = train('--max_steps=2')
  assert (run.code, _first_step(run)) == (0, 0)
  assert '%s is damaged' % (run_dir / 'model.ckpt-11') in run.stderr


def test_no_flipped_byte_escapes(run_dir):
  random = np.random.default_rng(0)
  for name in (DATA, INDEX):
    sound = (run_dir / name).read_bytes()
    for position in random.uniform(size=40):
      _flip(run_dir / name, position)
      found = cifar10.latest_checkpoint(str(run_dir))
      assert found.endswith('-0'), (name, position)
      (run_dir / name).write_bytes(sound)
  assert cifar10.latest_checkpoint(str(run_dir)).endswith('-11')


@pytest.mark.parametrize('name', [DATA, INDEX])
def test_evaluation_passes_over_a_damaged_checkpoint(
    use_tiny, call_script, run_dir, tmp_path, name):
  _flip(run_dir / name, 0.5)
  run = call_script(
      cifar10_eval.main, '--checkpoint_dir=%s' % run_dir, '--run_once',
      '--eval_dir=%s' % (tmp_path / 'eval'))
  assert run.code == 0
  assert 'at step 0\n' in run.stdout
  assert '%s is damaged' % (run_dir / 'model.ckpt-11') in run.stderr


@pytest.mark.parametrize('state', [
    None, b'', b'\xff\x00garbage', b'model_checkpoint_path: "model.ckpt-7"\n',
    b'model_checkpoint_path: "model.ckpt-0"\n'])
def test_checkpoints_are_found_whatever_the_file_that_lists_them_says(
    train, use_tiny, call_script, run_dir, tmp_path, state):
  if state is None:
    (run_dir / 'checkpoint').unlink()
  else:
    (run_dir / 'checkpoint').write_bytes(state)
  run = call_script(
      cifar10_eval.main, '--checkpoint_dir=%s' % run_dir, '--run_once',
      '--eval_dir=%s' % (tmp_path / 'eval'))
  assert 'at step 11\n' in run.stdout
  run = train('--max_steps=12')
  assert (run.code, _first_step(run)) == (0, 11)
  assert tf.train.latest_checkpoint(str(run_dir)).endswith('-12')


def test_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(
    train, run_dir):
  for path in run_dir.glob('*.index'):
    os.truncate(path, 10)
  before = _contents(run_dir)
  run = train('--max_steps=12')
  assert run.code == 1
  assert '--overwrite' in run.stderr.splitlines()[-1]
  after = _contents(run_dir)
  after.pop('.lock', None), before.pop('.lock', None)
  assert after == before
  assert train('--max_steps=1', '--overwrite').code == 0


def test_remains_of_a_killed_save_are_removed(train, run_dir):
  (run_dir / 'model.ckpt-22.meta').mkdir()
  remains = ['model.ckpt-20.data-00000-of-00001.tempstate123',
             'model.ckpt-20.data-00000-of-00001', 'model.ckpt-21.meta',
             'model.ckpt-11.index.tempstate99',
             'checkpoint.tmp' + 32 * 'a', 'graph.pbtxt.tmp' + 32 * '0']
  foreign = ['model.ckpt-best.index', 'notes.tmp' + 32 * 'a', 'my.tempstate1',
             'model.ckpt-1.tar.gz', 'model.ckpt-5.data.bak']
  for name in remains + foreign:
    (run_dir / name).write_text('x')
  assert train('--max_steps=12').code == 0
  names = set(os.listdir(run_dir))
  assert not names & set(remains)
  assert names > set(foreign) | {'model.ckpt-22.meta'}


def test_as_many_checkpoints_are_kept_as_asked_for(train, tmp_path):
  for max_steps in range(1, 5):
    assert train('--max_steps=%d' % max_steps, '--max_to_keep=2').code == 0
  steps = [int(path.suffixes[0][6:]) for path in tmp_path.glob('run/*.index')]
  assert sorted(steps) == [3, 4]


def test_checkpoints_can_be_kept_for_ever(set_flags, tmp_path):
  tf.get_variable('v', initializer=1.0)
  for hours, kept in ((0.0, 4), (1.0, 1)):
    set_flags(max_to_keep=1, keep_checkpoint_every_n_hours=hours)
    saver = cifar10_train.Saver()
    folder = tmp_path / str(kept)
    folder.mkdir()
    set_flags(train_dir=str(folder))
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      for step in range(4):
        saver.save(session, str(folder / 'model.ckpt'), step)
    assert len(list(folder.glob('*.index'))) == kept


def test_relative_train_dir_is_continued(
    use_tiny, call_script, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for max_steps in (1, 2, 3):
    run = call_script(
        cifar10_train.main, '--train_dir=run', '--max_steps=%d' % max_steps,
        '--log_frequency=1')
    assert (run.code, run.stderr) == (0, '')
    assert _first_step(run) == max_steps - 1


def test_removed_train_dir_ends_the_run_in_one_line(train, in_step, tmp_path):
  in_step(3, lambda: shutil.rmtree(tmp_path / 'run'))
  run = train('--max_steps=100000')
  assert run.code == 1
  assert 'Traceback' not in run.stderr
  assert '--train_dir=%s was removed' % (tmp_path / 'run') in (
      run.stderr.splitlines()[-1])


def test_checkpoint_of_other_types_is_refused_in_one_line(train, tmp_path):
  with tf.Graph().as_default(), tf.Session() as session:
    cifar10.inference(tf.zeros([1, 24, 24, 3]))
    tf.get_variable('global_step', initializer=3.0)
    session.run(tf.global_variables_initializer())
    (tmp_path / 'run').mkdir()
    tf.train.Saver().save(session, str(tmp_path / 'run' / 'model.ckpt'), 3)
  assert _is_one_line(
      train('--max_steps=9'), 'global_step is float32 there and int64 here')


def test_checkpoint_that_a_trainer_removes_is_left_out_of_evaluation(
    use_tiny, call_script, run_dir, tmp_path, monkeypatch):
  check = cifar10.check_checkpoint

  def check_too_late(checkpoint, variables):
    if checkpoint.endswith('-11'):
      for path in run_dir.glob('model.ckpt-11.*'):
        path.unlink()
    check(checkpoint, variables)

  monkeypatch.setattr(cifar10, 'check_checkpoint', check_too_late)
  run = call_script(
      cifar10_eval.main, '--checkpoint_dir=%s' % run_dir,
      '--eval_dir=%s' % (tmp_path / 'eval'), '--eval_interval_secs=0',
      '--eval_timeout_secs=1')
  assert (run.code, run.stderr) == (0, '')
  assert '-11 was removed before its evaluation' in run.stdout
  assert 'at step 0\n' in run.stdout


# A disk that is full.


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 12 MB, which is too small for two checkpoints."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mounted = subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', 'size=12m', 'none', str(folder)],
      stderr=subprocess.DEVNULL)
  if mounted.returncode:
    pytest.skip('only root may mount a file system')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


def test_full_disk_costs_the_last_checkpoint_and_no_other(
    use_tiny, call_script, small_disk):
  def train(max_steps):
    return call_script(
        cifar10_train.main, '--train_dir=%s' % small_disk,
        '--max_steps=%d' % max_steps, '--save_summary_steps=1000')
  assert train(1).code == 1  # Checkpoints 0 and 1 are too much for it.
  run = train(3)
  assert run.code == 1
  assert 'No space left on device' in run.stderr
  assert '\nTraceback' not in run.stderr
  assert 'could not be written' in run.stderr.splitlines()[-1]
  assert cifar10.latest_checkpoint(str(small_disk)) == str(
      small_disk / 'model.ckpt-0')
  assert not list(small_disk.glob('*temp*'))


def test_save_that_fails_once_is_made_up_for(
    use_tiny, call_script, small_disk, monkeypatch):
  filler = small_disk / 'filler'
  filler.write_bytes(bytes(8 << 20))
  after_create_session = cifar10_train.LoggerHook.after_create_session

  def make_room(self, *arguments):
    filler.unlink(missing_ok=True)
    after_create_session(self, *arguments)

  monkeypatch.setattr(
      cifar10_train.LoggerHook, 'after_create_session', make_room)
  run = call_script(
      cifar10_train.main, '--train_dir=%s' % small_disk, '--max_steps=3')
  assert run.code == 0
  assert run.stderr.count('could not be written') == 1
  assert cifar10.latest_checkpoint(str(small_disk)).endswith('-3')


def test_full_disk_under_the_event_file_is_told_at_the_end(
    use_tiny, call_script, in_step, small_disk):
  subprocess.run(
      ['mount', '-o', 'remount,size=30m', str(small_disk)], check=True)
  filler = small_disk / 'filler'

  def fill():
    with contextlib.suppress(OSError), open(filler, 'wb', 0) as f:
      while True:
        f.write(bytes(4096))

  in_step(3, fill)
  in_step(6, filler.unlink)
  run = call_script(
      cifar10_train.main, '--train_dir=%s' % small_disk, '--max_steps=9',
      '--save_summary_steps=1')
  assert run.code == 1
  first, last = run.stderr.splitlines()
  assert 'is full' in first and str(small_disk) in first
  assert 'step 9' in last and 'summaries' in last
  assert cifar10.latest_checkpoint(str(small_disk)).endswith('-9')


def test_read_only_train_dir_is_found_before_training(
    use_tiny, call_script, small_disk):
  subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
  run = call_script(cifar10_train.main, '--train_dir=%s' % small_disk)
  assert _is_one_line(run, '--train_dir=%s' % small_disk, 'Read-only')
  assert 'Filling' not in run.stdout


# Two trainers.


def test_second_trainer_on_a_train_dir_is_refused(
    start_script, wait_until, finish, run_script, synthetic_dir, tmp_path):
  flags = ['--dataset=synthetic', '--data_dir=%s' % synthetic_dir,
           '--train_dir=%s' % tmp_path, '--batch_size=8']
  first = start_script('cifar10_train', *flags)
  wait_until(first, lambda: 'step 0,' in first.stdout_path.read_text())
  second = run_script('cifar10_train', '--overwrite', *flags)
  assert _is_one_line(
      second, 'process %d ' % first.pid, '--train_dir=%s' % tmp_path)
  first.kill()
  assert finish(first).code == -signal.SIGKILL
  third = run_script('cifar10_train', '--max_steps=1', *flags)
  assert third.code == 0, third.stderr


# Signals.


def test_closed_console_ends_training_with_a_checkpoint(
    synthetic_dir, tmp_path):
  script = os.path.join(os.path.dirname(cifar10.__file__), 'cifar10_train.py')
  pid, console = pty.fork()
  if pid == 0:
    os.execv(sys.executable, [
        sys.executable, script, '--dataset=synthetic', '--log_frequency=1',
        '--data_dir=%s' % synthetic_dir, '--train_dir=%s' % tmp_path,
        '--batch_size=8'])
  output = b''
  while b'step 5,' not in output:
    output += os.read(console, 1000)
  os.close(console)
  _, status = os.waitpid(pid, 0)
  assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
  assert int(cifar10.latest_checkpoint(str(tmp_path)).split('-')[-1]) > 5


def test_pipe_that_nobody_reads_does_not_end_training(
    synthetic_dir, tmp_path):
  script = os.path.join(os.path.dirname(cifar10.__file__), 'cifar10_train.py')
  process = subprocess.Popen(
      [sys.executable, script, '--dataset=synthetic', '--log_frequency=1',
       '--data_dir=%s' % synthetic_dir, '--train_dir=%s' % tmp_path,
       '--batch_size=8', '--max_steps=20'], stdout=subprocess.PIPE)
  process.stdout.readline()
  process.stdout.close()
  assert process.wait(timeout=60) == 0
  assert cifar10.latest_checkpoint(str(tmp_path)).endswith('-20')


def test_signal_that_is_ignored_stays_so(train, in_step):
  handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup does.
  try:
    in_step(3, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert train('--max_steps=5').code == 0
  finally:
    signal.signal(signal.SIGHUP, handler)


def test_second_signal_ends_the_process_at_once(
    start_script, wait_until, finish, tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(
      'import signal, sys, time\n'
      'sys.path.insert(0, %r)\n'
      'import cifar10\n'
      'cifar10.handle_signals(lambda signum: print("first", flush=True))\n'
      'print("ready", flush=True)\n'
      'while True:\n  time.sleep(0.05)\n' % os.path.dirname(cifar10.__file__))
  process = start_script(str(script))
  wait_until(process, lambda: 'ready' in process.stdout_path.read_text())
  process.send_signal(signal.SIGTERM)
  wait_until(process, lambda: 'first' in process.stdout_path.read_text())
  process.send_signal(signal.SIGTERM)
  assert finish(process).code == -signal.SIGTERM


# Data that is not as it should be.


def _replace_by_a_folder(path):
  path.unlink()
  path.mkdir()


def _spoil_label(path):
  content = bytearray(path.read_bytes())
  content[7 * 3073] = 10
  path.write_bytes(content)


SPOILT = {
    'missing': (lambda path: path.unlink(), 'is missing'),
    'empty': (lambda path: os.truncate(path, 0), 'has 0 bytes'),
    'cut': (lambda path: os.truncate(path, 3073 * 20 + 5), 'has 61465 bytes'),
    'a record short': (
        lambda path: os.truncate(path, path.stat().st_size - 3073), 'not '),
    'grown': (lambda path: os.truncate(path, path.stat().st_size + 1), 'not '),
    'a folder': (_replace_by_a_folder, 'is not a file'),
    'wrong label': (_spoil_label, 'the label 10 in record 7'),
    'of another data set': (
        lambda path: path.write_bytes(bytes(3074 * 100)), 'has 307400 bytes'),
}


@pytest.fixture
def own_data(use_tiny, tiny, tiny_dir, set_flags, tmp_path):
  """The folder of a data set that may be spoilt."""
  shutil.copytree(tiny_dir, tmp_path / 'data')
  set_flags(data_dir=str(tmp_path / 'data'))
  return tmp_path / 'data' / tiny.folder


@pytest.mark.parametrize('fault', [
    fault for fault in SPOILT if fault != 'missing'])
@pytest.mark.parametrize('main, name', [
    (cifar10_train.main, 'second.bin'), (cifar10_eval.main, 'test.bin')])
def test_spoilt_file_is_named_before_anything_is_read(
    own_data, call_script, run_dir, tmp_path, main, name, fault):
  spoil, complaint = SPOILT[fault]
  spoil(own_data / name)
  run = call_script(main, *(
      ['--train_dir=%s' % (tmp_path / 'new')] if main == cifar10_train.main
      else ['--run_once', '--checkpoint_dir=%s' % run_dir,
            '--eval_dir=%s' % (tmp_path / 'eval')]))
  assert _is_one_line(run, own_data / name, complaint, 'delete')
  assert 'loss' not in run.stdout and 'precision' not in run.stdout


def test_file_that_cannot_be_read_is_named(
    own_data, train, monkeypatch):
  def refuse(path, *unused):
    raise PermissionError(13, 'Permission denied', path)
  monkeypatch.setattr(np, 'memmap', refuse)  # Root may read everything.
  assert _is_one_line(train(), own_data / 'first.bin', 'Permission denied')


@pytest.mark.parametrize('fault', SPOILT)
def test_file_that_changes_during_training_ends_it_with_a_checkpoint(
    own_data, train, in_step, tmp_path, fault):
  spoil, complaint = SPOILT[fault]
  in_step(3, lambda: spoil(own_data / 'second.bin'))
  run = train('--max_steps=100000')
  assert _is_one_line(run, own_data / 'second.bin', complaint)
  assert cifar10.latest_checkpoint(str(tmp_path / 'run')).endswith('-3')


@pytest.mark.parametrize('fault', ['missing', 'a folder'])
def test_fault_in_a_queue_thread_ends_the_run_with_its_own_cause(
    own_data, train, in_step, monkeypatch, fault):
  spoil, complaint = SPOILT[fault]
  in_step(3, lambda: spoil(own_data / 'second.bin'))
  # The thread that reads the file is the first to find out.
  monkeypatch.setattr(cifar10_train.StopHook, 'after_run', lambda *unused: None)
  run = train('--max_steps=100000')
  assert _is_one_line(run, own_data / 'second.bin', complaint)
  assert ': step 2,' in run.stdout


def test_files_are_looked_at_again_before_each_evaluation(
    own_data, call_script, run_dir, tmp_path, monkeypatch):
  def spoil_and_return(*unused):
    os.truncate(own_data / 'test.bin', 3073)
  monkeypatch.setattr(cifar10, 'check_checkpoint', spoil_and_return)
  run = call_script(
      cifar10_eval.main, '--checkpoint_dir=%s' % run_dir, '--run_once',
      '--eval_dir=%s' % (tmp_path / 'eval'))
  assert _is_one_line(run, own_data / 'test.bin', 'has 3073 bytes')


def test_evaluation_of_fewer_examples_than_there_should_be_is_refused(
    own_data, call_script, run_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(
      cifar10, 'check_files',
      lambda *unused: os.truncate(own_data / 'test.bin', 3073 * 30))
  run = call_script(
      cifar10_eval.main, '--checkpoint_dir=%s' % run_dir, '--run_once',
      '--eval_dir=%s' % (tmp_path / 'eval'))
  assert _is_one_line(run, 'only 30 of 70 examples')
  assert 'precision' not in run.stdout


# Numbers.


def test_variable_that_is_not_a_number_is_never_saved(tmp_path):
  cifar10.FLAGS.train_dir = str(tmp_path)
  variable = tf.get_variable('v', initializer=[1.0, 2.0])
  tf.get_variable('step', initializer=3)
  saver = cifar10_train.Saver()
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    saver.save(session, str(tmp_path / 'model.ckpt'), global_step=1)
    before = _contents(tmp_path)
    for value in (np.nan, np.inf):
      variable.load([1.0, value], session)
      with pytest.raises(UserError, match='not finite'):
        saver.save(session, str(tmp_path / 'model.ckpt'), global_step=1)
  assert _contents(tmp_path) == before


# Access.


def test_files_are_created_under_the_umask(train, tmp_path):
  umask = os.umask(0o027)
  try:
    assert train('--max_steps=1').code == 0
  finally:
    os.umask(umask)
  modes = {path.name: path.stat().st_mode & 0o777
           for path in (tmp_path / 'run').iterdir()}
  assert len(modes) > 8
  assert set(modes.values()) == {0o640}, modes


def test_folders_may_have_any_name(
    use_tiny, tiny_dir, call_script, set_flags, tmp_path):
  folder = "it's 100% {x} $HOME h\u00e4user \u4f60\u597d"
  shutil.copytree(tiny_dir, tmp_path / folder / 'data')
  set_flags(data_dir=str(tmp_path / folder / 'data'))
  train_dir = tmp_path / folder / 'train'
  for max_steps in (1, 2, 3):
    run = call_script(
        cifar10_train.main, '--train_dir=%s' % train_dir, '--max_to_keep=2',
        '--max_steps=%d' % max_steps, '--log_frequency=1')
    assert (run.code, run.stderr) == (0, '')
    assert _first_step(run) == max_steps - 1
  assert len(list(train_dir.glob('*.index'))) == 2
  run = call_script(
      cifar10_eval.main, '--checkpoint_dir=%s' % train_dir, '--run_once',
      '--eval_dir=%s' % (tmp_path / folder / 'eval'))
  assert 'at step 3\n' in run.stdout


# Flags.


@pytest.mark.parametrize('flag', [
    '--batch_size=251', '--batch_size=100000000000', '--num_examples=0',
    '--train_dir=/tmp/[1]', '--max_to_keep=-1',
    '--keep_checkpoint_every_n_hours=-1',
    '--num_preprocess_threads=1000000', '--seed=-1', '--seed=1' + 30 * '0'])
def test_number_that_makes_no_sense_is_explained_in_one_line(
    use_tiny, call_script, tmp_path, flag):
  main = cifar10_eval.main if 'examples' in flag else cifar10_train.main
  run = call_script(main, '--train_dir=%s' % tmp_path, flag)
  assert run.code in (1, 2)
  assert run.stderr.count('\n') == 1
  assert flag.split('=')[0] in run.stderr


def test_every_fault_in_the_table_has_its_test():
  tests = os.path.dirname(os.path.abspath(__file__))
  with open(os.path.join(tests, 'README.md')) as f:
    named = set(re.findall(r'`(test_\w+)`', f.read()))
  defined = set()
  for name in os.listdir(tests):
    if name.endswith('.py'):
      with open(os.path.join(tests, name)) as f:
        defined.update(re.findall(r'^def (test_\w+)', f.read(), re.MULTILINE))
  assert len(named) >= 30
  assert named <= defined

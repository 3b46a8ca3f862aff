"""Faults: what a run loses when something breaks, and what its owner is told.

They are real ones: flipped bytes, full disks, signals. README.md lists them.
"""
import contextlib
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import PIL.Image
import pytest

import cifar10_input
import cifar10_eval
import cifar10_train
from conftest import (
    ROOT, TINY, contents, finish, is_one_line, newest_step, printed_steps, tf,
    wait_until)


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
          '--data_dir=%s' % synthetic_dir, '--batch_size=8',
          '--train_dir=%s' % (tmp_path / 'run'), '--log_frequency=1']


# Damaged checkpoints.


def _flip(path, position):
  content = bytearray(path.read_bytes())
  content[int(position * len(content))] ^= 0x10
  path.write_bytes(content)


def _save_nan(path):
  """Writes a checkpoint that is whole, but has a value that is no number."""
  path = path.with_name('model.ckpt')
  with tf.Graph().as_default(), tf.Session() as session:
    tf.get_variable('conv1/biases', initializer=[1.0, np.nan])
    session.run(tf.global_variables_initializer())
    tf.train.Saver().save(session, str(path), 11, write_state=False)


DAMAGE = {
    'cut': lambda path: os.truncate(path, path.stat().st_size // 2),
    'one byte short': lambda path: os.truncate(path, path.stat().st_size - 1),
    'empty': lambda path: os.truncate(path, 0),
    'gone': lambda path: path.unlink(),
    'a pipe': lambda path: _replace(path, os.mkfifo),
    'not a number': _save_nan,
    'last byte flipped': lambda path: _flip(path, 0.9999999),
}

DATA, INDEX = 'model.ckpt-11.data-00000-of-00001', 'model.ckpt-11.index'


@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('name', [DATA, INDEX])
def test_damaged_newest_checkpoint_gives_way_to_the_one_before(
    run_dir, capsys, name, damage):
  DAMAGE[damage](run_dir / name)
  before = contents(run_dir)
  found = cifar10_train.latest_checkpoint(str(run_dir))
  assert found == str(run_dir / 'model.ckpt-0')
  if (name, damage) != (INDEX, 'gone'):  # Then it counts as never written.
    warning, = capsys.readouterr().err.splitlines()
    assert '%s is damaged and passed over: ' % (
        run_dir / 'model.ckpt-11') in warning
    assert ('not finite' in warning) == (damage == 'not a number')
  assert contents(run_dir) == before


def test_no_flipped_byte_escapes(run_dir):
  random = np.random.default_rng(0)
  for name in (DATA, INDEX):
    sound = (run_dir / name).read_bytes()
    # The last bytes of an index mean nothing to TensorFlow.
    for position in random.uniform(high=0.9, size=25):
      _flip(run_dir / name, position)
      found = cifar10_train.latest_checkpoint(str(run_dir))
      assert found.endswith('-0'), (name, position)
      (run_dir / name).write_bytes(sound)
  assert cifar10_train.latest_checkpoint(str(run_dir)).endswith('-11')


def test_training_and_evaluation_pass_over_a_damaged_checkpoint(
    train, evaluate, run_dir):
  _flip(run_dir / DATA, 0.5)
  for run in evaluate('--run_once', '--num_examples=8'), train('--max_steps=2'):
    assert run.code == 0
    assert '%s is damaged' % (run_dir / 'model.ckpt-11') in run.stderr
    assert 'at step 0\n' in run.stdout or printed_steps(run.stdout) == [0, 1]
  assert (run_dir / DATA).exists()


@pytest.mark.parametrize('name', [DATA, INDEX])
def test_checkpoint_that_may_not_be_read_is_not_called_damaged(
    run_dir, monkeypatch, capsys, name):
  run_dir.chmod(0o755)
  monkeypatch.chdir(run_dir)  # The folders above are closed to others.
  os.chmod(name, 0)
  try:
    if not os.geteuid():
      os.seteuid(65534)  # Root may read everything.
    with pytest.raises(tf.errors.PermissionDeniedError, match=name):
      cifar10_train.latest_checkpoint('.')
  finally:
    os.seteuid(os.getuid())
  assert 'damaged' not in capsys.readouterr().err


@pytest.mark.parametrize(
    'state', [None, b'\xff\x00', b'model_checkpoint_path: "model.ckpt-7"\n'])
def test_checkpoints_are_found_whatever_the_file_that_lists_them_says(
    train, run_dir, state):
  (run_dir / 'checkpoint').unlink()
  if state is not None:
    (run_dir / 'checkpoint').write_bytes(state)
  run = train('--max_steps=12')
  assert (run.code, printed_steps(run.stdout)) == (0, [11])
  assert tf.train.latest_checkpoint(str(run_dir)).endswith('-12')


def test_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(
    train, run_dir):
  for path in run_dir.glob('*.index'):
    os.truncate(path, 10)
  before = contents(run_dir)
  run = train('--max_steps=12')
  assert run.code == 1 and '--overwrite' in run.stderr.splitlines()[-1]
  assert contents(run_dir) == before
  assert train('--max_steps=1', '--overwrite').code == 0


def test_remains_of_a_killed_save_are_removed(train, run_dir):
  (run_dir / 'model.ckpt-22.meta').mkdir()
  remains = ['model.ckpt-20.data-00000-of-00001', 'model.ckpt-21.meta',
             'model.ckpt-20.data-00000-of-00001.tempstate123',
             'checkpoint.tmp' + 32 * 'a', 'graph.pbtxt.tmp' + 32 * '0']
  foreign = ['model.ckpt-best.index', 'notes.tmp' + 32 * 'a', 'my.tempstate1',
             'model.ckpt-1.tar.gz', 'model.ckpt-5.data.bak']
  for name in remains + foreign:
    (run_dir / name).write_text('x')
  assert train('--max_steps=12').code == 0
  names = set(os.listdir(run_dir))
  assert not names & {*remains} and names > {*foreign, 'model.ckpt-22.meta'}


def test_checkpoint_that_a_trainer_removes_is_left_out_of_evaluation(
    evaluate, run_dir, monkeypatch):
  check = cifar10_train.check_checkpoint

  def check_too_late(checkpoint, variables):
    if checkpoint.endswith('-11'):
      for path in run_dir.glob('model.ckpt-11.*'):
        path.unlink()
    check(checkpoint, variables)

  # So that evaluation ends after the checkpoint that is left.
  (run_dir / 'run.json').write_text(json.dumps(
      {'flags': {'max_steps': 0}, 'classes': TINY.classes}))
  monkeypatch.setattr(cifar10_train, 'check_checkpoint', check_too_late)
  run = evaluate()
  assert (run.code, run.stderr) == (0, '')
  assert re.search('-11 was removed.*at step 0\n', run.stdout, re.DOTALL)


# The folder of a run.


def test_train_dir_that_is_a_file_is_refused_in_one_line(train, tmp_path):
  (tmp_path / 'run').write_text('mine')
  assert is_one_line(train(), '--train_dir=%s' % (tmp_path / 'run'))
  assert (tmp_path / 'run').read_text() == 'mine'


def test_train_dir_that_is_a_checkpoint_is_refused_in_one_line(train, run_dir):
  before = contents(run_dir)
  run = train('--train_dir=%s' % (run_dir / 'model.ckpt-11'))
  assert is_one_line(run, 'model.ckpt-11 is a checkpoint: name its folder')
  assert contents(run_dir) == before


def _replace(path, make):
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  make(path)


def test_removed_train_dir_is_made_again_or_its_absence_told(
    train, in_step, tmp_path):
  in_step(3, lambda: shutil.rmtree(tmp_path / 'run'))
  assert train('--max_steps=4').code == 0 and newest_step(tmp_path / 'run') == 4
  in_step(3, lambda: _replace(tmp_path / 'run', lambda path: path.touch()))
  run = train('--max_steps=8')
  assert is_one_line(run, '--train_dir=%s is no folder any more' % (
      tmp_path / 'run'))


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 18 MB for the run: too small for two checkpoints."""
  folder = tmp_path / 'run'
  folder.mkdir()
  mounted = subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', 'size=18m', 'none', str(folder)],
      stderr=subprocess.DEVNULL)
  if mounted.returncode:
    pytest.skip('only root may mount a file system')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


def test_export_that_finds_no_room_leaves_nothing_behind(
    call_script, small_disk, trained):
  (small_disk / 'filler').write_bytes(bytes(15 << 20))
  run = call_script(
      cifar10_eval, '--checkpoint_dir=%s' % trained.train_dir,
      '--export_dir=%s' % (small_disk / 'model'))
  assert is_one_line(run, small_disk / 'model', 'No space left')
  assert [path.name for path in small_disk.iterdir()] == ['filler']


def test_evaluation_whose_events_find_no_room_fails_in_one_line(
    evaluate, small_disk, trained):
  with contextlib.suppress(OSError):
    (small_disk / 'filler').write_bytes(bytes(20 << 20))
  run = evaluate('--checkpoint_dir=%s' % trained.train_dir, '--run_once',
                 '--eval_dir=%s' % (small_disk / 'eval'))
  assert is_one_line(run, 'No space left')


def test_full_disk_ends_the_run_and_costs_no_earlier_checkpoint(
    train, small_disk):
  run = train('--max_steps=2')
  assert is_one_line(run, 'No space left on device')
  assert printed_steps(run.stdout) == [0, 1]
  assert cifar10_train.latest_checkpoint(str(small_disk)).endswith('-0')
  subprocess.run(
      ['mount', '-o', 'remount,size=50m', str(small_disk)], check=True)
  run = train('--max_steps=2')
  assert (run.code, run.stderr, newest_step(small_disk)) == (0, '', 2)
  assert not list(small_disk.glob('*temp*'))


def test_full_disk_under_the_event_file_costs_no_checkpoint(
    train, in_step, small_disk):
  subprocess.run(
      ['mount', '-o', 'remount,size=40m', str(small_disk)], check=True)
  filler = small_disk / 'filler'

  def fill():
    with contextlib.suppress(OSError):
      filler.write_bytes(bytes(40 << 20))

  in_step(3, fill)
  in_step(6, filler.unlink)
  assert train('--max_steps=9', '--save_summary_steps=1').code == 0
  assert newest_step(small_disk) == 9


def test_file_that_finds_no_room_leaves_the_old_one_whole(small_disk):
  path = small_disk / 'run.json'
  path.write_text('old')
  with contextlib.suppress(OSError):
    (small_disk / 'filler').write_bytes(bytes(20 << 20))
  with pytest.raises(cifar10_input.UserError, match='%s cannot be' % path):
    cifar10_input.write_file(str(path), lambda f: f.write('new' * 9999))
  assert path.read_text() == 'old'


def test_full_disk_under_converted_pictures_is_no_fault_of_a_picture(
    small_disk, tmp_path, capfd):
  for name in ('train/a', 'train/b', 'test/a', 'test/b'):
    (tmp_path / 'mine' / name).mkdir(parents=True)
    for i in range(9):
      PIL.Image.new('RGB', [9, 9]).save(tmp_path / 'mine' / name / f'{i}.png')
  with contextlib.suppress(OSError):
    (small_disk / 'filler').write_bytes(bytes(20 << 20))
  with pytest.raises(cifar10_input.UserError, match='No space left'):
    cifar10_input.own_dataset(str(tmp_path / 'mine'), str(small_disk))
  assert 'Skipped' not in capfd.readouterr().out


@pytest.mark.parametrize('make', [
    os.mkfifo, os.mkdir, lambda path: path.symlink_to('../mine')])
def test_what_is_no_file_is_neither_replaced_nor_followed(tmp_path, make):
  (tmp_path / 'mine').write_text('mine')
  (tmp_path / 'run').mkdir()
  path = tmp_path / 'run' / 'table.csv'
  make(path)
  with pytest.raises(cifar10_input.UserError, match='%s is no reg' % path):
    cifar10_input.write_file(str(path), lambda f: f.write('x'))
  make(tmp_path / 'run' / '.train_dir.lock')
  with pytest.raises(cifar10_input.UserError, match='cannot be written to'):
    with cifar10_input.locked(str(tmp_path / 'run'), 'train_dir'):
      pass
  (tmp_path / 'run' / 'new.csv.tmp').symlink_to('../mine')
  cifar10_input.write_file(
      str(tmp_path / 'run' / 'new.csv'), lambda f: f.write('x'))
  assert (tmp_path / 'run' / 'new.csv').read_text() == 'x'
  assert (tmp_path / 'mine').read_text() == 'mine'


def test_read_only_train_dir_is_found_before_training(train, small_disk):
  subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
  run = train()
  assert is_one_line(run, '--train_dir=%s' % small_disk, 'Read-only')
  assert run.stdout == ''


def test_second_trainer_on_a_train_dir_is_refused(train, run_dir):
  before = contents(run_dir)
  with cifar10_input.locked(str(run_dir), 'train_dir'):
    for flag in '--overwrite', '--max_steps=12':
      assert is_one_line(train(flag), 'process %d uses' % os.getpid(),
                         '--train_dir=%s' % run_dir)
  assert contents(run_dir) == before
  assert train('--max_steps=12').code == 0


def test_files_are_created_under_the_umask(train, tmp_path):
  umask = os.umask(0o027)
  try:
    assert train('--max_steps=1').code == 0
  finally:
    os.umask(umask)
  modes = {path.name: path.stat().st_mode & 0o777
           for path in (tmp_path / 'run').iterdir()}
  assert len(modes) > 8 and set(modes.values()) == {0o640}, modes


def test_folders_may_have_any_name(train, evaluate, tiny_dir, tmp_path):
  folder = tmp_path / "it's 100% {x} $HOME h\u00e4user \u4f60\u597d"
  shutil.copytree(tiny_dir, folder / 'data')
  for step in range(2):
    run = train('--data_dir=%s' % (folder / 'data'), '--max_to_keep=1',
                '--train_dir=%s' % (folder / 'run'),
                '--max_steps=%d' % (step + 1))
    assert (run.code, run.stderr, printed_steps(run.stdout)) == (0, '', [step])
  assert list(cifar10_train.checkpoints(str(folder / 'run'))) == [2]
  run = evaluate('--checkpoint_dir=%s' % (folder / 'run'),
                 '--eval_dir=%s' % (folder / 'eval'))
  assert 'at step 2\n' in run.stdout


def test_system_without_what_windows_lacks_trains(
    start_script, command, tmp_path):
  script = tmp_path / 'other_system.py'
  script.write_text(textwrap.dedent('''\
      import os, signal, sys
      sys.modules['fcntl'] = None
      del signal.SIGHUP, os.statvfs, os.geteuid
      sys.path.insert(0, %r)
      import cifar10_train
      cifar10_train.run_script(cifar10_train.main, cifar10_train.define_flags)
      ''' % str(ROOT)))
  run = finish(start_script(str(script), *command[1:], '--max_steps=2'))
  assert (run.code, run.stderr, newest_step(tmp_path / 'run')) == (0, '', 2)


# Signals.


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_run_continues_at_the_saved_step(
    start_script, command, train, tmp_path, signum):
  folder = tmp_path / 'run'
  process = start_script(*command, '--save_checkpoint_secs=1')
  wait_until(process, lambda: newest_step(folder))
  process.send_signal(signum)
  run = finish(process)
  saved = newest_step(folder)
  if signum == signal.SIGKILL:
    assert run.code == -signal.SIGKILL
  else:
    assert (run.code, run.stderr) == (143, '')
    assert 'SIGTERM with a checkpoint' in run.stdout.splitlines()[-1]
    assert printed_steps(run.stdout)[-1] == saved - 1
  before = set(contents(folder))
  run = train('--max_steps=%d' % (saved + 2))
  assert (run.code, printed_steps(run.stdout)) == (0, [saved, saved + 1])
  kept = {name for name in before if name.startswith(
      ('events', 'model.ckpt-%d.' % saved)) and 'tmp' not in name}
  assert len(kept) > 2 and kept <= set(contents(folder))


@pytest.mark.parametrize('signum, code', [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signal_ends_training_after_the_step_it_came_in(
    train, in_step, tmp_path, signum, code):
  in_step(3, lambda: os.kill(os.getpid(), signum))
  run = train('--max_steps=9')
  assert (run.code, run.stderr) == (code, '')
  assert signum.name in run.stdout.splitlines()[-1]
  assert newest_step(tmp_path / 'run') == 3


@pytest.mark.parametrize('signum', [signal.SIGHUP, signal.SIGINT])
def test_signal_that_is_ignored_stays_so(train, in_step, signum):
  signal.signal(signum, signal.SIG_IGN)  # As nohup does, and a script's `&`.
  in_step(2, lambda: os.kill(os.getpid(), signum))
  assert train('--max_steps=3').code == 0


def test_second_signal_ends_the_process_at_once(start_script, tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(textwrap.dedent('''\
      import sys, time
      sys.path.insert(0, %r)
      import cifar10_train
      with cifar10_train.handling_signals(lambda signum: print('first')):
        print('ready')
        while True:
          time.sleep(0.05)
      ''' % str(ROOT)))
  process = start_script(str(script))
  for said in ('ready', 'first'):
    wait_until(process, lambda: said in process.stdout_path.read_text())
    process.send_signal(signal.SIGTERM)
  assert finish(process).code == -signal.SIGTERM


@pytest.mark.parametrize('module', ['numpy', 'tensorflow'])
def test_ctrl_c_in_the_first_seconds_ends_without_a_traceback(
    start_script, tmp_path, module):
  package = tmp_path / module
  package.mkdir()
  (package / '__init__.py').write_text(
      'import time; print("importing"); time.sleep(60)')
  process = start_script('cifar10_train', PYTHONPATH=str(tmp_path))
  wait_until(process, lambda: process.stdout_path.read_text())
  process.send_signal(signal.SIGINT)
  run = finish(process)
  assert (run.code, run.stderr) == (-signal.SIGINT, '')


def test_closed_console_ends_training_with_a_checkpoint(command, tmp_path):
  pid, console = pty.fork()
  if pid == 0:
    os.execv(sys.executable, [sys.executable, *command])
  output = b''
  while b'step 2,' not in output:
    output += os.read(console, 1000)
  os.close(console)
  _, status = os.waitpid(pid, 0)
  assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
  assert newest_step(tmp_path / 'run') > 2


def test_pipe_that_nobody_reads_does_not_end_training(command, tmp_path):
  process = subprocess.Popen(
      [sys.executable, *command, '--max_steps=9'], stdout=subprocess.PIPE)
  process.stdout.readline()
  process.stdout.close()
  assert process.wait(timeout=60) == 0
  assert newest_step(tmp_path / 'run') == 9


def test_closed_stderr_does_not_keep_a_training_from_its_start(
    command, tmp_path):
  # No file that is opened later may become the new stderr.
  code = '''if True:
      import sys, cifar10_input
      with open(sys.argv[1]) as script:
        assert script.fileno() > 2
        sys.argv[:] = sys.argv[1:]
        exec(script.read())'''
  subprocess.run(
      ['sh', '-c', '"$@" 2>&-', 'sh', sys.executable, '-c', code, *command,
       '--max_steps=1'], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
  assert newest_step(tmp_path / 'run') == 1


# Data that is not as it should be.


def _spoil_labels(path):
  np.memmap(path, np.uint8).reshape(-1, 3073)[7:, 0] = 10


@pytest.fixture
def own_data(tiny_dir, tmp_path):
  """The folder of a data set in tmp_path / 'data' that may be spoilt."""
  return shutil.copytree(tiny_dir, tmp_path / 'data') / TINY.folder


def test_spoilt_file_is_named_before_anything_is_read(
    own_data, train, evaluate, run_dir, tmp_path):
  for script, name in (train, 'second.bin'), (evaluate, 'test.bin'):
    os.truncate(own_data / name, 3073 * 20 + 5)
    run = script('--data_dir=%s' % (tmp_path / 'data'))
    assert is_one_line(run, own_data / name, 'has 61465 bytes', 'delete')
    assert 'loss' not in run.stdout and 'precision' not in run.stdout


def test_file_that_cannot_be_read_is_named(train, monkeypatch):
  def refuse(path, *unused):
    raise PermissionError(13, 'Permission denied', path)
  monkeypatch.setattr(np, 'memmap', refuse)  # Root may read everything.
  assert is_one_line(train(), 'first.bin', 'Permission denied')


@pytest.mark.parametrize('spoil, complaint', [
    (lambda path: path.unlink(), 'is missing'),
    (lambda path: _replace(path, pathlib.Path.mkdir), 'is not a file'),
    (_spoil_labels, 'the label 10 in record 7')])
def test_file_that_spoils_a_training_is_named(
    own_data, train, in_step, tmp_path, spoil, complaint):
  in_step(3, lambda: spoil(own_data / 'second.bin'))
  run = train('--data_dir=%s' % (tmp_path / 'data'))
  assert is_one_line(run, own_data / 'second.bin', complaint)
  assert cifar10_train.latest_checkpoint(str(tmp_path / 'run'))


def test_files_that_are_all_emptied_are_named_when_a_step_takes_too_long(
    own_data, train, in_step, tmp_path, monkeypatch):
  def spoil():
    for name in TINY.train_files:
      os.truncate(own_data / name, 0)

  monkeypatch.setattr(cifar10_train, '_STEP_SECS', 2)
  in_step(3, spoil)
  run = train('--data_dir=%s' % (tmp_path / 'data'), '--max_steps=1000000')
  assert is_one_line(run, own_data / 'first.bin', 'has 0 bytes')


def test_every_fault_in_the_table_has_its_test():
  tests = pathlib.Path(__file__).parent
  defined = {name for path in tests.glob('test_*.py') for name in re.findall(
      r'^def (test_\w+)', path.read_text(), re.MULTILINE)}
  rows = [line for line in (tests / 'README.md').read_text().splitlines()
          if ' | ' in line][2:]
  assert len(rows) >= 30
  assert [row for row in rows
          if row.split('| ')[-1].strip('`') not in defined] == []

"""What the tests share: small data sets, flags, sessions, scripts as commands.

All five modules are imported into one process, because importing TensorFlow is
what costs most. Only what a user sees of a process (exit codes, a clean
console, signals) is tested on processes of its own.
"""
import contextlib
import dataclasses
import faulthandler
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cifar10_input  # Before TensorFlow: it hides the start-up messages.
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_eval
import cifar10_multi_gpu_train
import cifar10_train

FLAGS = tf.flags.FLAGS
FLAGS(['test'])

SCRIPTS = (cifar10_train, cifar10_multi_gpu_train, cifar10_eval)

# The variables of the original, which sees 24 pixels of each side.
SHAPES = {
    'conv1/weights': [5, 5, 3, 64], 'conv1/biases': [64],
    'conv2/weights': [5, 5, 64, 64], 'conv2/biases': [64],
    'local3/weights': [2304, 384], 'local3/biases': [384],
    'local4/weights': [384, 192], 'local4/biases': [192],
    'softmax_linear/weights': [192, 10], 'softmax_linear/biases': [10],
}

# The lines that people parse, to the letter.
STEP_LINE = re.compile(
    r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: step (\d+), loss = (\d+\.\d\d) '
    r'\((\d+\.\d) examples/sec; (\d+\.\d{3}) sec/batch\)')
PRECISION_LINE = re.compile(
    r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: precision @ 1 = ([01]\.\d{3})')
CORRECT_LINE = re.compile(r'(\d+)/(\d+) correct at step (\d+)')

# nohup ignores SIGHUP, and a script's `&` SIGINT, also in what runs below them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# A test that hangs ends the run after so long, and the rest with it.
_HANG_SECS = 240


@pytest.fixture(autouse=True)
def fresh_start():
  """Gives each test its own graph, flags, signal handlers and patience."""
  faulthandler.dump_traceback_later(_HANG_SECS, exit=True)
  handlers = {
      s: signal.getsignal(s)
      for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
  with forgotten_flags(), tf.Graph().as_default():
    tf.set_random_seed(1)
    yield
  for signum, handler in handlers.items():
    signal.signal(signum, handler)
  faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def forgotten_flags():
  """Removes the flags that are defined inside, and takes back other changes."""
  states = {name: {**vars(FLAGS[name]), 'validators': FLAGS[name].validators[:]}
            for name in FLAGS}
  try:
    yield
  finally:
    for name in set(FLAGS) - set(states):
      delattr(FLAGS, name)
    for name in set(FLAGS) & set(states):
      vars(FLAGS[name]).update(states[name])


def parse_flags(script, *flags):
  """Defines the flags of a script and parses some, until the test ends."""
  script.define_flags()
  FLAGS(['script.py', *flags])


# Data.


TINY = dataclasses.replace(
    cifar10_input.SYNTHETIC, folder='tiny-batches-bin',
    train_files={'first.bin': 150, 'second.bin': 100},
    eval_files={'test.bin': 70})

# Its records have two label bytes, as those of CIFAR-100.
TWO_LABELS = dataclasses.replace(
    TINY, label_bytes=2,
    classes=tuple(f'class {i}' for i in range(100)))


@pytest.fixture(scope='session')
def tiny_dir(tmp_path_factory):
  """A data directory with the generated pictures of `TINY`."""
  data_dir = tmp_path_factory.mktemp('tiny')
  cifar10_input.prepare(TINY, str(data_dir))
  return data_dir


@pytest.fixture(scope='session')
def synthetic_dir(tmp_path_factory):
  """A data directory with the synthetic data set."""
  data_dir = tmp_path_factory.mktemp('synthetic')
  cifar10_input.prepare(cifar10_input.SYNTHETIC, str(data_dir))
  return data_dir


@pytest.fixture
def tiny_flags(monkeypatch, tiny_dir):
  """Flags with which a script in this process works on `TINY`."""
  monkeypatch.setitem(cifar10_input.DATASETS, 'synthetic', TINY)
  return ['--dataset=synthetic', f'--data_dir={tiny_dir}', '--batch_size=8']


def write_random(dataset, folder):
  """Writes random records. Returns labels and pictures of each file."""
  random = np.random.default_rng(0)
  os.makedirs(folder, exist_ok=True)
  written = {}
  for name, size in dataset.files.items():
    records = random.integers(
        0, 256, (size, dataset.record_bytes), dtype=np.uint8)
    records[:, dataset.label_bytes - 1] = random.integers(
        0, len(dataset.classes), size)
    records.tofile(os.path.join(folder, name))
    written[name] = records[:, dataset.label_bytes - 1], np.moveaxis(
        records[:, dataset.label_bytes:].reshape(size, 3, 32, 32), 1, 3)
  return written


def write_coded(dataset, folder):
  """Writes pictures which tell the number of their record. Returns the folder.

  Record i of all files has the label i % 10. Its red is 0, its green i, its
  blue 250: no distortion changes where green lies between red and blue.
  """
  os.makedirs(folder, exist_ok=True)
  start = 0
  for name, size in dataset.files.items():
    numbers = np.arange(start, start + size) % 250
    start += size
    records = np.zeros([size, dataset.record_bytes], np.uint8)
    records[:, dataset.label_bytes - 1] = numbers % 10
    planes = records[:, dataset.label_bytes:].reshape(size, 3, -1)
    planes[:, 1] = numbers[:, np.newaxis]
    planes[:, 2] = 250
    records.tofile(os.path.join(folder, name))
  return str(folder)


def read_codes(images):
  """Returns the numbers of the records that images of `write_coded` show."""
  red, green, blue = np.moveaxis(images.mean(axis=(1, 2)), 1, 0)
  return np.rint(250 * (green - red) / (blue - red)).astype(int)


@contextlib.contextmanager
def run_queues():
  """Makes a session of the graph with all queues running, without end."""
  config = tf.ConfigProto(operation_timeout_in_ms=60000)
  with tf.train.MonitoredSession(
      tf.train.ChiefSessionCreator(config=config)) as session:
    try:
      yield session
    except tf.errors.OutOfRangeError:  # A MonitoredSession would swallow it.
      pytest.fail('the input ended')


def contents(folder):
  """Returns all files below a folder but locks: contents by relative path."""
  folder = pathlib.Path(folder)
  return {str(path.relative_to(folder)): path.read_bytes()
          for path in folder.rglob('*')
          if path.suffix != '.lock' and (path.is_file() or path.is_symlink())}


# The scripts.


@pytest.fixture
def call_script(monkeypatch, capfd):
  """Function that runs a script in this process: code, stdout and stderr."""
  def call_script(script, *flags):
    monkeypatch.setattr(sys, 'argv', ['script.py', *flags])
    capfd.readouterr()
    with forgotten_flags(), tf.Graph().as_default(), \
        pytest.raises(SystemExit) as exit_info:
      cifar10_train.run_script(script.main, script.define_flags)
    stdout, stderr = capfd.readouterr()
    code = exit_info.value.code or 0
    if isinstance(code, str):  # Python prints it to stderr and exits with 1.
      code, stderr = 1, f'{stderr}{code}\n'
    return types.SimpleNamespace(code=code, stdout=stdout, stderr=stderr)
  return call_script


@pytest.fixture
def train(call_script, tiny_flags, tmp_path):
  """Function that trains on `TINY` in tmp_path / 'run', in this process."""
  return lambda *flags: call_script(
      cifar10_train, *tiny_flags, f'--train_dir={tmp_path / "run"}',
      '--log_frequency=1', *flags)


@pytest.fixture
def evaluate(call_script, tiny_flags, tmp_path):
  """Function that evaluates that run on `TINY`, in this process."""
  return lambda *flags: call_script(
      cifar10_eval, *tiny_flags, f'--checkpoint_dir={tmp_path / "run"}',
      f'--eval_dir={tmp_path / "eval"}', *flags)


@pytest.fixture(scope='session')
def start_script(tmp_path_factory):
  """Function that starts a script and returns the `subprocess.Popen`.

  What the script prints goes to the files `stdout_path` and `stderr_path`.
  Keywords are variables of its environment.
  """
  processes = []

  def start_script(script, *flags, **environment):
    path = script if os.path.isabs(script) else str(ROOT / (script + '.py'))
    # cifar10_input has silenced TensorFlow's log for this process and those
    # that inherit from it: the scripts must manage without that.
    inherited = {**os.environ, 'PYTHONUNBUFFERED': '1'}
    inherited.pop('TF_CPP_MIN_LOG_LEVEL', None)
    folder = tmp_path_factory.mktemp('console')
    stdout_path, stderr_path = folder / 'stdout', folder / 'stderr'
    with open(stdout_path, 'w') as stdout, open(stderr_path, 'w') as stderr:
      process = subprocess.Popen(
          [sys.executable, path, *flags], env={**inherited, **environment},
          cwd=str(folder), stdin=subprocess.DEVNULL, stdout=stdout,
          stderr=stderr)
    process.stdout_path, process.stderr_path = stdout_path, stderr_path
    processes.append(process)
    return process

  yield start_script
  for process in processes:
    process.kill()
    process.wait()


def finish(process):
  """Waits for a started script: its code, stdout and stderr."""
  process.wait(timeout=120)
  return types.SimpleNamespace(
      code=process.returncode, stdout=process.stdout_path.read_text(),
      stderr=process.stderr_path.read_text())


def wait_until(process, condition):
  """Waits for a condition while a started script runs."""
  for _ in range(1200):
    if condition():
      return
    assert process.poll() is None, process.stderr_path.read_text()
    time.sleep(0.1)
  pytest.fail('it did not happen')


@pytest.fixture(scope='session')
def trained(start_script, synthetic_dir, tmp_path_factory):
  """A run of cifar10_train.py over eleven steps, and its train_dir."""
  train_dir = tmp_path_factory.mktemp('trained')
  run = finish(start_script(
      'cifar10_train', '--dataset=synthetic', f'--data_dir={synthetic_dir}',
      f'--train_dir={train_dir}', '--batch_size=8', '--max_steps=11',
      '--log_frequency=5', '--save_summary_steps=5'))
  run.train_dir = train_dir
  return run


@pytest.fixture
def run_dir(trained, tmp_path):
  """A copy of its train_dir, with checkpoints of the steps 0 and 11."""
  return shutil.copytree(trained.train_dir, tmp_path / 'run')


def is_one_line(run, *parts):
  """Whether a run failed as a user's mistake does, naming the parts."""
  return (run.code == 1 and run.stderr.count('\n') == 1
          and all(str(part) in run.stderr for part in parts))


def printed_steps(stdout):
  """Returns the steps of all lines that tell one."""
  return [int(STEP_LINE.fullmatch(line)[1])
          for line in stdout.splitlines() if ': step ' in line]


def newest_step(folder):
  """Returns the step of the newest checkpoint in a folder, or None."""
  return max(cifar10_train.checkpoints(str(folder)), default=None)


def events(folder):
  """Returns the events of a folder as (step, tag, value)."""
  return [(event.step, value.tag, value)
          for path in sorted(pathlib.Path(folder).glob('events.out.*'))
          for event in tf.train.summary_iterator(str(path))
          for value in event.summary.value]

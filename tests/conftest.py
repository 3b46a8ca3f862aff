"""What the tests share: small data sets, flags, sessions, scripts as commands.

All five modules are imported into one process, because importing TensorFlow is
what costs most. Only what a user sees of a process (exit codes, a clean
console, signals) is tested on processes of its own.
"""
import contextlib
import dataclasses
import faulthandler
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cifar10
import cifar10_input
from cifar10_input import tf

FLAGS = tf.flags.FLAGS

SCRIPTS = ('cifar10_train', 'cifar10_multi_gpu_train', 'cifar10_eval')

for _script in SCRIPTS:
  importlib.import_module(_script)
FLAGS(['test'])

# nohup ignores SIGHUP, also in what is started below it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A test that hangs ends the run after so long, and the rest with it.
_HANG_SECS = 240


@pytest.fixture(autouse=True)
def fresh_start():
  """Gives each test its own graph, flags, signal handlers and patience."""
  faulthandler.dump_traceback_later(_HANG_SECS, exit=True)
  handlers = {
      s: signal.getsignal(s)
      for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
  values = FLAGS.flag_values_dict()
  with tf.Graph().as_default():
    tf.set_random_seed(1)
    yield
  for name, value in values.items():
    FLAGS[name].value, FLAGS[name].using_default_value = value, True
  for signum, handler in handlers.items():
    signal.signal(signum, handler)
  faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def set_flags():
  """Function that sets flags until the test ends."""
  def set_flags(**values):
    for name, value in values.items():
      setattr(FLAGS, name, value)
  return set_flags


@pytest.fixture
def session():
  """Function that starts a session with all queues running."""
  with contextlib.ExitStack() as stack:
    def start():
      config = tf.ConfigProto(operation_timeout_in_ms=60000)
      return stack.enter_context(tf.train.MonitoredSession(
          tf.train.ChiefSessionCreator(config=config)))
    yield start


# Data.


def _dataset(**changes):
  return dataclasses.replace(
      cifar10_input.SYNTHETIC, name='tiny', folder='tiny-batches-bin',
      **{'train_files': {'first.bin': 150, 'second.bin': 100},
         'eval_files': {'test.bin': 70}, **changes})


@pytest.fixture(scope='session')
def tiny():
  """A data set of a few hundred records."""
  return _dataset()


@pytest.fixture(scope='session')
def two_labels():
  """One whose records have two label bytes, as those of CIFAR-100."""
  return _dataset(
      label_bytes=2, label_byte=1,
      classes=tuple('class %d' % i for i in range(100)))


@pytest.fixture(scope='session')
def tiny_dir(tmp_path_factory, tiny):
  """A data directory with the generated pictures of `tiny`."""
  return _generate(tiny, tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='session')
def synthetic_dir(tmp_path_factory):
  """A data directory with the synthetic data set."""
  return _generate(
      cifar10_input.SYNTHETIC, tmp_path_factory.mktemp('synthetic'))


def _generate(dataset, data_dir):
  cifar10_input.maybe_download_and_extract(dataset, str(data_dir))
  return data_dir


@pytest.fixture
def use_tiny(monkeypatch, set_flags, tiny, tiny_dir):
  """Makes --dataset=synthetic mean `tiny`, in small batches."""
  monkeypatch.setitem(cifar10_input.DATASETS, 'synthetic', tiny)
  set_flags(dataset='synthetic', data_dir=str(tiny_dir), batch_size=8)


@pytest.fixture(scope='session')
def write_coded():
  """Function that writes pictures which tell the number of their record.

  Record i of all files has the label i % 10. Its red is 0, its green i, its
  blue 250: no distortion changes where green lies between red and blue.
  """
  def write_coded(dataset, folder):
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
  return write_coded


@pytest.fixture(scope='session')
def decode():
  """Function that gives the numbers of the records which images show."""
  def decode(images):
    red, green, blue = np.moveaxis(images.mean(axis=(1, 2)), 1, 0)
    return np.rint(250 * (green - red) / (blue - red)).astype(int)
  return decode


# The scripts as commands.


def _environment():
  # cifar10_input has silenced TensorFlow's log for this process and those that
  # inherit from it: the scripts must manage without that.
  environment = {**os.environ, 'PYTHONUNBUFFERED': '1'}
  environment.pop('TF_CPP_MIN_LOG_LEVEL', None)
  return environment


def _command(script, flags):
  path = script if os.path.isabs(script) else str(ROOT / (script + '.py'))
  return [sys.executable, path] + list(flags)


@pytest.fixture(scope='session')
def start_script(tmp_path_factory):
  """Function that starts a script and returns the `subprocess.Popen`.

  What the script prints goes to the files `stdout_path` and `stderr_path`.
  Keywords are variables of its environment.
  """
  processes = []

  def start_script(script, *flags, **environment):
    folder = tmp_path_factory.mktemp('console')
    stdout_path, stderr_path = folder / 'stdout', folder / 'stderr'
    with open(stdout_path, 'w') as stdout, open(stderr_path, 'w') as stderr:
      process = subprocess.Popen(
          _command(script, flags), env={**_environment(), **environment},
          cwd=str(folder), stdin=subprocess.DEVNULL, stdout=stdout,
          stderr=stderr)
    process.stdout_path, process.stderr_path = stdout_path, stderr_path
    processes.append(process)
    return process

  yield start_script
  for process in processes:
    process.kill()
    process.wait()


@pytest.fixture(scope='session')
def finish():
  """Function that waits for a started script: its code, stdout and stderr."""
  def finish(process):
    process.wait(timeout=120)
    return types.SimpleNamespace(
        code=process.returncode, stdout=process.stdout_path.read_text(),
        stderr=process.stderr_path.read_text())
  return finish


@pytest.fixture(scope='session')
def wait_until():
  """Function that waits for a condition while a started script runs."""
  def wait_until(process, condition):
    for _ in range(1200):
      if condition():
        return
      assert process.poll() is None, process.stderr_path.read_text()
      time.sleep(0.1)
    pytest.fail('it did not happen')
  return wait_until


@pytest.fixture(scope='session')
def run_script(start_script, finish):
  """Function that runs a script to its end: its code, stdout and stderr."""
  return lambda script, *flags: finish(start_script(script, *flags))


@pytest.fixture
def call_script(monkeypatch, capfd):
  """Function that runs a `main` in this process as `cifar10.run` does."""
  def call_script(main, *flags, name='script.py'):
    monkeypatch.setattr(sys, 'argv', [name] + list(flags))
    known = set(FLAGS)
    capfd.readouterr()
    try:
      with pytest.raises(SystemExit) as exit_info:
        cifar10.run(main)
    finally:
      for name in set(FLAGS) - known:
        delattr(FLAGS, name)
    stdout, stderr = capfd.readouterr()
    return types.SimpleNamespace(
        code=exit_info.value.code or 0, stdout=stdout, stderr=stderr)
  return call_script


@pytest.fixture(scope='session')
def trained(run_script, synthetic_dir, tmp_path_factory):
  """A run of cifar10_train.py over eleven steps, and its train_dir."""
  train_dir = tmp_path_factory.mktemp('trained')
  run = run_script(
      'cifar10_train', '--dataset=synthetic', '--data_dir=%s' % synthetic_dir,
      '--train_dir=%s' % train_dir, '--batch_size=8', '--max_steps=11',
      '--log_frequency=5', '--save_summary_steps=5')
  run.train_dir = train_dir
  return run


@pytest.fixture
def events():
  """Function that gives the events of a folder as (step, tag, value)."""
  def events(folder):
    return [(event.step, value.tag, value)
            for path in sorted(pathlib.Path(folder).glob('events.out.*'))
            for event in tf.train.summary_iterator(str(path))
            for value in event.summary.value]
  return events

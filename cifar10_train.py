"""Train the CIFAR-10 network on one device.

    python cifar10_train.py         # CIFAR-10, 100,000 steps
    python cifar10_train.py --dataset=synthetic --train_dir=/tmp/synthetic_train

The second command needs no download. Each data set needs its own --train_dir.
Started again, a run continues from its last checkpoint in --train_dir. Ctrl-C,
SIGTERM and SIGHUP save one first. While it trains, cifar10_eval.py evaluates
it, and `tensorboard --logdir=/tmp/cifar10_train` shows what goes on inside.
"""
import contextlib
import dataclasses
from datetime import datetime, timedelta
import json
import os
import re
import signal
import sys
import time

try:
  import fcntl
except ImportError:  # Windows has no such locks.
  fcntl = None

import cifar10_input  # Before TensorFlow: it hides the start-up messages.
import numpy as np
import tensorflow.compat.v1 as tf

import cifar10
from cifar10_input import UserError, say

FLAGS = tf.flags.FLAGS
_PROC = '/proc'  # Where Linux describes the machine.


def train(build=None):
  """Trains on one device. A script of yours may `build` another step."""
  with locked(FLAGS.train_dir) as train_dir:
    run_training(train_dir, build or build_step)


def build_step(dataset, recipe, global_step):
  """Builds one step of training on one device.

  Returns the operation that does the step, and its loss, a scalar float32.
  """
  # The input runs on the CPU, which leaves the GPU to the network.
  with tf.device('/cpu:0'):
    images, labels = training_batches(dataset, recipe, recipe.batch_size)
  logits = cifar10.inference(images, recipe)
  loss = cifar10.loss(logits, labels, recipe=recipe)
  return cifar10.train(loss, global_step, recipe), loss


def training_batches(dataset, recipe, batch_size):
  """Builds the input of training; see `cifar10_input.distorted_inputs`."""
  return cifar10.distorted_inputs(
      dataset, batch_size, image_size=recipe.image_size,
      crop_margin=recipe.crop_margin,
      min_fraction_of_examples_in_queue=FLAGS.min_fraction_of_examples_in_queue,
      deterministic=FLAGS.deterministic)


def run_training(train_dir, build, batches_per_step=1, signals=None, target='',
                 worker=0, device=None, hooks=(), config=None):
  """Trains on any number of devices up to --max_steps, or until a signal comes.

  `build` builds a step, as `build_step` does; it learns from batches_per_step
  batches. The other arguments are for a cluster: the list of signals that came,
  the session's server, the worker's number (0 is the chief), where operations
  go, more hooks, and the session's configuration.
  """
  dataset = cifar10_input.find_dataset(FLAGS.dataset)
  recipe = flags_recipe(dataset)
  checkpoint = None if FLAGS.overwrite else latest_checkpoint(train_dir)
  if checkpoint and worker == 0:
    check_run(train_dir, dataset, recipe)
  if checkpoint and step_of(checkpoint) >= recipe.max_steps:
    say(f'{checkpoint} has all its steps: raise --max_steps, or --overwrite.')
    return
  dataset = cifar10_input.prepare(dataset, FLAGS.data_dir, FLAGS.data_url)
  counts = cifar10_input.check_files(dataset, dataset.train_files)
  recipe = dataclasses.replace(recipe, examples_per_epoch=sum(counts.values()))
  say_where('Training', recipe.dtype)
  if FLAGS.deterministic:
    tf.compat.v2.config.experimental.enable_op_determinism()
  with tf.Graph().as_default() as graph, tf.device(device):
    if FLAGS.seed is not None or FLAGS.deterministic:
      tf.set_random_seed((FLAGS.seed or 0) + worker)  # Each draws other images.
    global_step = tf.train.get_or_create_global_step()
    train_op, loss = build(dataset, recipe, global_step)
    # Read after this step, not during it; in a cluster, others raise it, too.
    with tf.name_scope('train/'), tf.control_dependencies([train_op]):
      steps_done = tf.identity(global_step.read_value(), name='steps_done')
    writer = None
    if worker == 0:
      start_run(train_dir, dataset, recipe)
      writer = tf.summary.FileWriter(train_dir, graph)  # For TensorBoard.
    logger = LoggerHook(loss, steps_done, recipe, batches_per_step, writer)
    saver = SaverHook(train_dir, loss, recipe)
    hooks = [*hooks, logger]
    start = time.monotonic()
    with (collecting_signals() if signals is None else
          contextlib.nullcontext(signals)) as signals, _session(
              target, worker, config, hooks, saver, writer) as session:
      while not session.should_stop() and not signals:
        session.run(train_op)
  if signals:
    say(f'Stopped by {signals[0].name}: the same command continues.')
    sys.exit(128 + signals[0])  # As shells expect.
  if logger.step < recipe.max_steps:  # The session hides the error.
    raise UserError(f'the input ended at step {logger.step}: has a file in '
                    f'{dataset.folder} changed?')
  duration = timedelta(seconds=round(time.monotonic() - start))
  say(f'Trained up to step {logger.step} in {duration}. To evaluate it: python '
      f'cifar10_eval.py --run_once --checkpoint_dir={train_dir}')


def _session(target, worker, config, hooks, saver, writer):
  """Starts a session that also logs, summarizes and saves.

  A MonitoredTrainingSession initializes or restores variables, starts the
  threads of the queues, and calls hooks around each step. A Scaffold holds what
  it needs to start: here, how to save and to restore.
  """
  config = config or tf.ConfigProto()
  config.allow_soft_placement = True
  config.log_device_placement = FLAGS.log_device_placement
  if worker == 0:
    # `hooks` come first: in a cluster, they let the workers begin.
    hooks = [*hooks, saver, tf.train.SummarySaverHook(
        FLAGS.save_summary_steps, summary_writer=writer,
        summary_op=tf.summary.merge_all())]
  return tf.train.MonitoredTrainingSession(
      target, worker == 0, config=config, hooks=hooks, stop_grace_period_secs=1,
      scaffold=tf.train.Scaffold(saver=saver.saver, init_fn=saver.restore))


class LoggerHook(tf.train.SessionRunHook):
  """Shows loss and speed every --log_frequency steps, and ends training."""

  def __init__(self, loss, steps_done, recipe, batches_per_step, writer):
    self._fetches, self._recipe = [loss, steps_done], recipe
    self._writer = writer  # For TensorBoard; None for a worker of a cluster.
    self._examples_per_step = recipe.batch_size * batches_per_step

  def after_create_session(self, session, coord):
    self.step = self._logged = session.run(tf.train.get_global_step())
    self._time, self._num_lines = time.monotonic(), 0

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(self._fetches)

  def after_run(self, run_context, run_values):
    before = self.step - 1
    loss, self.step = run_values.results
    check_loss(loss, self.step - 1, self._recipe)
    if self.step >= self._recipe.max_steps:
      run_context.request_stop()
    # Log when a multiple is passed: other workers do steps in between.
    if (self.step - 1) // FLAGS.log_frequency == before // FLAGS.log_frequency:
      return
    now = time.monotonic()
    secs = (now - self._time) / (self.step - self._logged)
    speed = self._examples_per_step / secs
    say(f'{datetime.now()}: step {self.step - 1}, loss = {loss:.2f} '
        f'({speed:.1f} examples/sec; {secs:.3f} sec/batch)')
    if self._writer:
      summary = tf.Summary()
      summary.value.add(tag='speed/examples per sec', simple_value=speed)
      summary.value.add(tag='speed/sec per batch', simple_value=secs)
      self._writer.add_summary(summary, self.step)
    self._logged, self._time = self.step, now
    self._num_lines += 1
    steps_left = self._recipe.max_steps - self.step
    if self._num_lines % 50 == 2 and steps_left * secs > 60:
      time_left = timedelta(seconds=round(steps_left * secs))
      epochs_left = steps_left * self._examples_per_step / (
          self._recipe.examples_per_epoch)
      say(f'{steps_left} steps ({epochs_left:.1f} epochs) left, about '
          f'{time_left}.')

  def end(self, session):  # Other workers may have done steps since.
    self.step = session.run(tf.train.get_global_step())


class SaverHook(tf.train.SessionRunHook):
  """Restores the newest checkpoint, and saves others.

  It saves first, every --save_checkpoint_secs, and last. Before, it computes
  the loss: no checkpoint is of a run that has failed. (TensorFlow's own hook
  does not; and if the clock is set back by a day, it saves nothing for a day.)
  """

  def __init__(self, train_dir, loss, recipe):
    self._train_dir, self._loss, self._recipe = train_dir, loss, recipe
    self._variables = {v.op.name: v for v in tf.global_variables()}
    self.saver = tf.train.Saver(  # Relative paths: so --train_dir may be moved.
        self._variables, max_to_keep=FLAGS.max_to_keep,
        save_relative_paths=True)

  def restore(self, scaffold, session):
    # Also called when a broken session is replaced: look for newer checkpoints.
    newest = latest_checkpoint(self._train_dir, report=False)
    if not newest:
      return
    say(f'Continuing from {newest}.')
    restore_checkpoint(newest, self.saver, session, self._variables)
    paths = list(checkpoints(self._train_dir).values())
    end = paths.index(newest) + 1
    paths = paths[end:] + paths[:end]  # Damaged ones go first.
    while 0 < FLAGS.max_to_keep < len(paths):
      tf.train.remove_checkpoint(paths.pop(0))
    # So that the saver removes them when there are enough newer ones.
    self.saver.recover_last_checkpoints(paths)

  def after_create_session(self, session, coord):
    self._save(session)

  def after_run(self, run_context, run_values):
    if time.monotonic() >= self._next_time:
      self._save(run_context.session)

  def end(self, session):
    self._save(session)

  def _save(self, session):
    step = session.run(tf.train.get_global_step())
    with contextlib.suppress(tf.errors.OutOfRangeError):  # The input may end.
      check_loss(session.run(self._loss), step, self._recipe)
    self.saver.save(session, os.path.join(self._train_dir, 'model.ckpt'), step)
    self._next_time = time.monotonic() + FLAGS.save_checkpoint_secs


def check_loss(loss, step, recipe):
  """Raises a UserError if a loss, after a number of steps, is not finite."""
  if not np.isfinite(loss):
    raise UserError(f'the loss after {step} steps is {loss}: lower '
                    f'--learning_rate (now {recipe.learning_rate}).')


def say_where(verb, dtype):
  """Says where the network is computed, and warns if that is too slow."""
  gpus = tf.config.list_physical_devices('GPU')
  if gpus:
    details = tf.config.experimental.get_device_details(gpus[0])
    say(f'{verb} on GPU:0 ({details.get("device_name")}).')
    return
  say(f'{verb} on the CPU, {os.cpu_count()} cores.')
  if os.path.exists(os.path.join(_PROC, 'driver/nvidia/version')):
    tf.logging.warning("TensorFlow cannot use this machine's GPU: pip install "
                       "'tensorflow[and-cuda]'.")
  with contextlib.suppress(OSError), open(os.path.join(_PROC, 'cpuinfo')) as f:
    if dtype != 'float32' and not re.search(
        'avx512_fp16' if dtype == 'float16' else 'avx512_bf16|amx_bf16',
        f.read()):
      tf.logging.warning(f'This processor computes {dtype} many times as '
                         'slowly as float32.')


# What a run keeps in its folder, and how it is found again. All of it goes
# through TensorFlow's file systems, so the folder may be a URL.


def full_path(path):
  """Returns a path as an absolute one, without ~; a URL as it is."""
  return path if '://' in path else os.path.abspath(os.path.expanduser(path))


@contextlib.contextmanager
def locked(folder):
  """Makes a folder, yields its path, and keeps other trainers out of it.

  (Not on Windows, nor at a URL.) The system releases the lock when the process
  ends. The file stays: deleting it could let two processes in.
  """
  folder = full_path(folder)
  tf.io.gfile.makedirs(folder)
  if not fcntl or '://' in folder:
    yield folder
    return
  with open(os.path.join(folder, '.train_dir.lock'), 'a') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f'another process trains in --train_dir={folder}: end it '
                      'first, or name another folder.') from None
    yield folder


def checkpoints(folder):
  """Returns the checkpoints in a folder, paths by steps, the oldest first.

  We list the files, because TensorFlow's own file `checkpoint` may be missing,
  stale, or copied from another run.
  """
  names = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
  matches = [re.fullmatch(r'model\.ckpt-(\d+)\.index', name) for name in names]
  steps = sorted(int(match[1]) for match in matches if match)
  return {step: os.path.join(folder, f'model.ckpt-{step}') for step in steps}


def step_of(checkpoint):
  """Returns the number of steps that a checkpoint was saved after."""
  return int(checkpoint.rpartition('-')[2])


def latest_checkpoint(folder, report=True):
  """Returns the newest whole checkpoint; None if there are no checkpoints."""
  found = checkpoints(folder)
  for path in reversed(found.values()):
    try:
      reader = tf.train.NewCheckpointReader(path)
      for name in reader.get_variable_to_shape_map():
        value = reader.get_tensor(name)  # Checks the CRC-32C of its bytes.
        if value.dtype.kind == 'f' and not np.isfinite(value).all():
          raise ValueError(f'{name} is not finite')
      return path
    except Exception as error:  # A truncated file can raise an IndexError.
      if report:
        print(f'{path} is damaged and skipped: {first_line(error)}',
              file=sys.stderr, flush=True)
  if found:
    raise UserError(f'no checkpoint in {folder} is whole: see --overwrite.')
  return None


def restore_checkpoint(checkpoint, saver, session, variables):
  """Restores variables, if they fit: `Saver` takes values of any shape."""
  reader = tf.train.NewCheckpointReader(checkpoint)
  shapes = reader.get_variable_to_shape_map()
  for name, variable in variables.items():
    here, there = variable.shape.as_list(), shapes.get(name, 'missing')
    if here != there:
      raise UserError(f'{checkpoint} does not fit the network: {name} is '
                      f'{there} there and {here} here.')
  saver.restore(session, checkpoint)


@dataclasses.dataclass(frozen=True)
class Run:
  """What run.json says about a run."""
  dataset: str
  data_dir: str
  classes: list
  recipe: cifar10.Recipe


def start_run(train_dir, dataset, recipe):
  """Writes run.json. With --overwrite, removes an earlier run first."""
  if FLAGS.overwrite:
    ours = re.compile(r'model\.ckpt-\d+\.(index|meta|data-.*)|checkpoint|'
                      r'events\.out\.tfevents\..*')
    eval_dir = os.path.join(train_dir, 'eval')
    leads_elsewhere = os.path.islink(eval_dir)
    for folder in [train_dir] if leads_elsewhere else [train_dir, eval_dir]:
      names = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
      for name in filter(ours.fullmatch, names):
        tf.io.gfile.remove(os.path.join(folder, name))
  run = Run(dataset.name, full_path(FLAGS.data_dir), dataset.classes, recipe)
  path = os.path.join(train_dir, 'run.json')
  with tf.io.gfile.GFile(path + '.tmp', 'w') as f:
    json.dump(dataclasses.asdict(run), f, indent=1)
  tf.io.gfile.rename(path + '.tmp', path, overwrite=True)


def read_run(folder):
  """Returns the `Run` in a folder; None if it has no run.json."""
  path = os.path.join(folder, 'run.json')
  if not tf.io.gfile.exists(path):
    return None
  with tf.io.gfile.GFile(path) as f:
    try:
      run = Run(**json.load(f))
      return dataclasses.replace(run, recipe=cifar10.Recipe(**run.recipe))
    except (ValueError, TypeError) as error:
      raise UserError(f'{path} cannot be used ({error}): remove it, and '
                      'repeat the flags of that run.') from error


def check_run(train_dir, dataset, recipe, exactly=False):
  """Refuses to continue a run with other classes, network or optimizer.

  Other differences are printed or, with `exactly`, refused, too.
  """
  run = read_run(train_dir)
  if not run:
    return
  if list(dataset.classes) != run.classes:
    raise UserError(f'{train_dir} was trained on the classes of --dataset='
                    f'{run.dataset}, not of {dataset.name}.')
  fixed = ['image_size', 'model', 'optimizer']
  for name in 'momentum', 'label_smoothing':
    if bool(getattr(recipe, name)) != bool(getattr(run.recipe, name)):
      fixed.append(name)  # Only one of them has variables for it.
  if {recipe.learning_rate_schedule,
      run.recipe.learning_rate_schedule} == {'linear'}:
    fixed.append('max_steps')  # The rate would jump.
  for name, then in dataclasses.asdict(run.recipe).items():
    now = getattr(recipe, name)
    if now == then or name == 'examples_per_epoch':
      continue
    flag = name if name == 'dtype' else '--' + name
    if exactly or name in fixed:
      raise UserError(f'{train_dir} was trained with {flag}={then}, not {now}: '
                      'use that value again, or another --train_dir.')
    say(f'{flag} is {now} now, was {then}.')


# Flags. Each script defines only its own, just before it parses them: so
# evaluation refuses those that only training has.


def define_data_flags():
  """Defines the flags that all scripts have."""
  tf.flags.adopt_module_key_flags(cifar10)  # So that --help shows them.
  if 'dataset' in FLAGS:
    return
  tf.flags.DEFINE_string(
      'dataset', 'cifar10', f'{", ".join(cifar10_input.DATASETS)}, or a folder '
      'with pictures in train/CLASS/ and test/CLASS/.')
  tf.flags.DEFINE_string(
      'data_url', None, 'Another address (http, https or file) of the data '
      "set's archive, or of the folder with svhn's files.")


def define_flags():
  """Defines the flags of training."""
  define_data_flags()
  if 'train_dir' in FLAGS:
    return
  tf.flags.DEFINE_string('train_dir', '/tmp/cifar10_train',
                         'Folder, or URL, for checkpoints and event files.')
  tf.flags.DEFINE_boolean('overwrite', False, 'Start again from step 0, and '
                          'remove the earlier run in --train_dir.')
  for name, default, lower_bound, help_text in [
      ('log_frequency', 10, 1, 'Steps between two lines on the console.'),
      ('save_summary_steps', 100, 1, 'Steps between two sets of summaries.'),
      ('save_checkpoint_secs', 600, 1, 'Seconds between two checkpoints.'),
      ('max_to_keep', 5, 0, 'How many checkpoints to keep; 0 keeps all.'),
      ('seed', None, 0, 'The same seed draws the same initial weights.')]:
    tf.flags.DEFINE_integer(name, default, help_text, lower_bound)
  tf.flags.DEFINE_boolean(
      'use_bfloat16', False, 'Compute activations in bfloat16, on GPUs and on '
      'CPUs with AVX512-BF16 or AMX. Variables and losses stay in float32.')
  tf.flags.mark_bool_flags_as_mutual_exclusive(['use_fp16', 'use_bfloat16'])
  tf.flags.DEFINE_boolean('log_device_placement', False,
                          'Show which device each operation is on.')
  tf.flags.DEFINE_float(
      'min_fraction_of_examples_in_queue',
      cifar10_input.MIN_FRACTION_OF_EXAMPLES_IN_QUEUE,
      'The shuffle queue always holds this share of an epoch.', 0.0, 1.0)
  tf.flags.DEFINE_boolean(
      'deterministic', False, 'Make all runs with the same --seed (default 0) '
      'end with the same variables, byte for byte.')
  tf.flags.DEFINE_enum(
      'recipe', 'original', list(cifar10.RECIPES), 'Values of flags not given: '
      "the tutorial's (original, to compare with others), those that are as "
      'precise in a tenth of the time (fast, to try ideas), or a point better '
      'in a seventh (strong, for the best network).')
  define = {int: tf.flags.DEFINE_integer, float: tf.flags.DEFINE_float,
            str: tf.flags.DEFINE_enum}
  for field in dataclasses.fields(cifar10.Recipe):
    if field.metadata:
      define[field.type](field.name, field.default, **field.metadata)


def flags_recipe(dataset):
  """Returns the `cifar10.Recipe` that the flags describe for a data set."""
  recipe = (cifar10.original_recipe() if FLAGS.recipe == 'original'
            else cifar10.RECIPES[FLAGS.recipe])
  given = {field.name: FLAGS[field.name].value
           for field in dataclasses.fields(recipe)
           if field.name in FLAGS and not FLAGS[field.name].using_default_value}
  dtype = 'bfloat16' if FLAGS.use_bfloat16 else cifar10.original_recipe().dtype
  return dataclasses.replace(
      recipe, **given, num_classes=len(dataset.classes), dtype=dtype)


# How a script starts and ends.


def run_script(main, define_flags):
  """Runs `main(argv)` with `tf.app.run`. Prints expected errors as one line."""
  with contextlib.suppress(AttributeError):  # In a notebook.
    for console in sys.stdout, sys.stderr:  # It may not know UTF-8.
      console.reconfigure(errors='backslashreplace')
  # On SIGTERM outside the training loop, exit through `finally` and `with`.
  signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
  # tf.app.run would print every message twice, and more than warnings.
  tf.get_logger().setLevel('WARNING')
  tf.get_logger().propagate = False
  define_flags()
  try:
    tf.app.run(main)
  except KeyboardInterrupt:
    sys.exit(128 + signal.SIGINT)
  except (UserError, OSError, ImportError, tf.flags.Error,
          tf.errors.OpError) as error:
    hint = ' (--help lists all)' if isinstance(error, tf.flags.Error) else ''
    sys.exit(f'{os.path.basename(sys.argv[0])}: {first_line(error)}{hint}')


def first_line(error):
  """Returns an error's message as one line, without TensorFlow's node list."""
  message = getattr(error, 'message', None) or str(error) or repr(error)
  before_list = re.search(r'^(.*)\n\s*\[\[\{\{node', message, re.MULTILINE)
  return before_list[1] if before_list else message.splitlines()[0]


def parse_flags(argv, define_flags):
  """Returns the arguments of a script's `main(argv)` that are not flags.

  `tf.app.run` leaves unknown flags in argv. Without argv, when your own script
  calls `main()`, they are ignored.
  """
  define_flags()
  if argv is None:
    FLAGS(sys.argv, known_only=True)
    return []
  arguments = FLAGS(argv)[1:]
  if arguments and not ('predict' in FLAGS and FLAGS.predict):
    raise UserError(f'{arguments[0]} is not a flag: flags are --name=value.')
  return arguments


@contextlib.contextmanager
def collecting_signals():
  """Yields a list that gets the first signal; a second one ends the process.

  Signals that are ignored, as SIGHUP is under nohup, stay ignored.
  """
  signals = []

  def note(signum, frame):
    signals.append(signal.Signals(signum))
    signal.signal(signum, signal.SIG_DFL)

  handled = {signal.SIGINT, signal.SIGTERM,
             getattr(signal, 'SIGHUP', signal.SIGTERM)}  # Not on Windows.
  earlier = {signum: signal.signal(signum, note) for signum in handled
             if signal.getsignal(signum) != signal.SIG_IGN}
  try:
    yield signals
  finally:
    for signum, handler in earlier.items():
      signal.signal(signum, handler)


def main(argv=None, build=None):
  parse_flags(argv, define_flags)
  train(build)


if __name__ == '__main__':
  run_script(main, define_flags)

"""Train the CIFAR-10 network on one device.

    python cifar10_train.py         # CIFAR-10, 100,000 steps
    python cifar10_train.py --dataset=synthetic --train_dir=/tmp/synthetic_train

The second command needs no download; each data set needs its own --train_dir.

A run that ended, whatever ended it, continues from its last checkpoint in
--train_dir when it is started again. Ctrl-C, SIGTERM and SIGHUP save one first.
While it trains, cifar10_eval.py tells how well the network does, and
`tensorboard --logdir=/tmp/cifar10_train` shows what goes on inside.
"""
import contextlib
import dataclasses
from datetime import datetime, timedelta
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time

import cifar10_input  # First: Ctrl-C is without traceback, TensorFlow quiet.
import numpy as np
import tensorflow.compat.v1 as tf
from tensorboard.plugins.hparams import api as hparams
from tensorboard.plugins.text import summary_v2 as text

import cifar10
from cifar10_input import UserError, say, what_went_wrong

flags = tf.flags
FLAGS = flags.FLAGS


def train():
  """Trains on one device. Returns the exit code."""
  return run_training(build_step, FLAGS.batch_size)


def build_step(dataset, recipe, global_step):
  """Builds one step of training on one device.

  Args:
    dataset: the `cifar10_input.Dataset` to learn from.
    recipe: the `cifar10.Recipe`.
    global_step: int64 variable, the number of steps done.

  Returns:
    The operation that does the step, and its loss, a scalar float32.
  """
  # The input belongs on the CPU, so that a GPU is left to the network.
  with tf.device('/cpu:0'):
    images, labels = training_batches(dataset, FLAGS.batch_size)
  logits = cifar10.inference(images, recipe)
  loss = cifar10.loss(logits, labels, recipe=recipe)
  return cifar10.train(loss, global_step, recipe), loss


# What the flags say, as values.


def training_batches(dataset, batch_size):
  """Builds the input of training; see `cifar10.distorted_inputs`."""
  return cifar10.distorted_inputs(
      dataset, batch_size, image_size=FLAGS.image_size,
      crop_margin=FLAGS.crop_margin,
      min_fraction_of_examples_in_queue=FLAGS.min_fraction_of_examples_in_queue,
      deterministic=FLAGS.deterministic)


def prepare_dataset():
  """Returns the data set that --dataset names, after a download if need be."""
  if FLAGS.dataset not in cifar10_input.DATASETS:
    return cifar10_input.own_dataset(FLAGS.dataset, FLAGS.data_dir)
  dataset = cifar10_input.DATASETS[FLAGS.dataset]
  cifar10_input.maybe_download_and_extract(
      dataset, FLAGS.data_dir, FLAGS.data_url)
  return dataset


def network_recipe(classes):
  """Returns the part of the `cifar10.Recipe` that evaluation needs."""
  return cifar10.Recipe(
      num_classes=len(classes), model=FLAGS.model,
      dtype=(tf.bfloat16 if FLAGS.use_bfloat16 else
             tf.float16 if FLAGS.use_fp16 else tf.float32))


def training_recipe(dataset, examples_per_step):
  """Returns the whole `cifar10.Recipe`."""
  schedule = FLAGS.learning_rate_schedule
  return dataclasses.replace(
      network_recipe(dataset.classes),
      learning_rate=FLAGS.learning_rate,
      schedule=schedule,
      decay_steps=FLAGS.max_steps if schedule != 'staircase' else
      cifar10.steps_per_decay(dataset.num_train_examples, examples_per_step),
      momentum=FLAGS.momentum,
      optimizer=FLAGS.optimizer,
      label_smoothing=FLAGS.label_smoothing,
      weight_decay=FLAGS.weight_decay,
      moving_average_decay=FLAGS.moving_average_decay)


# The training of a network on any number of devices.


@dataclasses.dataclass(eq=False)  # TensorFlow takes hooks for keys of a dict.
class Task:
  """What this process is in a training; by default, all of it."""
  worker: int = 0         # Index among all workers; the chief has 0. It alone
                          # writes to --train_dir.
  num_workers: int = 1    # Workers that share each step.
  target: str = ''        # What a session connects to.
  device: object = None   # Where operations go, for `tf.device`.
  hooks: tuple = ()       # Hooks that the session must have.
  config: tf.ConfigProto = dataclasses.field(default_factory=tf.ConfigProto)
  signals: list = dataclasses.field(default_factory=list)  # Those that came.

  @property
  def is_chief(self):
    return self.worker == 0

  def steps_done(self, train_op, global_step):
    """Returns the number of steps after a step, a scalar int64."""
    with tf.name_scope('train/'), tf.control_dependencies([train_op]):
      return tf.identity(global_step.read_value(), name='steps_done')

  def is_last(self, steps_done):
    """Returns whether this task ends after a step."""
    return steps_done >= FLAGS.max_steps


def run_training(build, examples, task=None):
  """Trains until --max_steps, or until something else ends it.

  Args:
    build: function that builds a step, as `build_step` does.
    examples: images that this process learns from in a step.
    task: the `Task` of this process.

  Returns:
    The exit code: 0, or 128 plus the number of the signal.
  """
  task = task or Task()
  if run_folder(FLAGS.train_dir) != FLAGS.train_dir:
    raise UserError(f'--train_dir={FLAGS.train_dir} is a checkpoint: name its '
                    'folder.')
  with (cifar10_input.locked(FLAGS.train_dir, 'train_dir') if task.is_chief
        else contextlib.nullcontext()):
    checkpoint = _checkpoint_to_continue()
    if checkpoint:
      _say_where_it_starts(checkpoint)
      if step_of(checkpoint) >= FLAGS.max_steps:
        return 0
    if not task.is_chief:
      checkpoint = None  # The chief restores it, and may remove it.
    dataset = prepare_dataset()
    if checkpoint:
      check_classes(FLAGS.train_dir, dataset)
    if examples > dataset.num_train_examples:
      raise UserError(f'a step of {examples} images is more than the '
                      f'{dataset.num_train_examples} there are: lower '
                      '--batch_size.')
    if FLAGS.use_fp16 and not tf.config.list_physical_devices('GPU'):
      tf.logging.warn('--use_fp16 is for GPUs: a CPU takes most of a minute '
                      'for a step.')
    if FLAGS.deterministic:
      tf.compat.v2.config.experimental.enable_op_determinism()
    with tf.Graph().as_default(), tf.device(task.device):
      if FLAGS.seed is not None:  # Each worker draws images of its own.
        tf.set_random_seed(FLAGS.seed + task.worker)
      return _build_and_run(build, dataset, examples, task, checkpoint)


def _build_and_run(build, dataset, examples, task, checkpoint):
  """Builds the graph and runs it; see `run_training`."""
  tf.summary.FileWriterCache.clear()  # A program may train more than once.
  examples_per_step = examples * task.num_workers
  global_step = tf.train.get_or_create_global_step()
  train_op, loss = build(
      dataset, training_recipe(dataset, examples_per_step), global_step)
  steps_done = task.steps_done(train_op, global_step)
  scaffold = _scaffold(checkpoint)  # Refuses one that does not fit.
  if task.is_chief:
    _remove_remains()
    write_run(dataset)
    _show_run(step_of(checkpoint) if checkpoint else 0)
  logger = LoggerHook(loss, steps_done, examples_per_step, task)
  start_time = time.monotonic()
  try:
    with contextlib.ExitStack() as until_saved:
      with _session(scaffold, task, logger) as session:
        # Before, a signal ends the process.
        until_saved.enter_context(handling_signals(task.signals.append))
        while not session.should_stop() and not task.signals:
          _do_step(session, train_op, dataset, task)
  except (tf.errors.OpError, ValueError) as error:
    _explain(error, dataset, task)
    raise
  return _tell_end(logger.step, task, round(time.monotonic() - start_time))


def _do_step(session, train_op, dataset, task):
  try:
    session.run(train_op)
  except tf.errors.DeadlineExceededError as error:
    _explain(error, dataset, task)  # If nothing is wrong, it was paused.


def _tell_end(step, task, secs):
  """Says how a run ended. Returns the exit code."""
  if step >= FLAGS.max_steps:
    if task.is_chief:
      say(f'Trained up to step {step} in {timedelta(seconds=secs)}. To '
          'evaluate it: python cifar10_eval.py --run_once '
          + shlex.quote(f'--checkpoint_dir={FLAGS.train_dir}'))
    return 0
  if not task.signals:
    raise UserError(f'the input ended at step {step}: has a file of the data '
                    'set changed?')
  signum = task.signals[0]
  saved = ' with a checkpoint' if task.is_chief else ''
  say(f'Stopped by {signum.name}{saved}: the same command continues.')
  return 128 + signum


def _scaffold(checkpoint):
  """Returns what saves checkpoints, and starts from one if there is one."""
  saver = tf.train.Saver(
      max_to_keep=FLAGS.max_to_keep,
      save_relative_paths=True)  # So that --train_dir may be moved.
  if not checkpoint:
    return tf.train.Scaffold(saver=saver)
  step = step_of(checkpoint)
  saver.recover_last_checkpoints([  # It removes them, as it adds new ones.
      path for older, path in checkpoints(FLAGS.train_dir).items()
      if older <= step])
  # All but the step, which the original's multi-GPU script counts in float32.
  global_step = tf.train.get_global_step()
  variables = {
      v.op.name: v for v in tf.global_variables() if v is not global_step}
  check_checkpoint(checkpoint, variables)
  with tf.name_scope('session/'):
    restorer = tf.train.Saver(variables, name='restore')

  def restore(scaffold, session):
    restorer.restore(session, checkpoint)
    global_step.load(step, session)

  return tf.train.Scaffold(init_op=tf.no_op(), init_fn=restore, saver=saver)


def _session(scaffold, task, logger):
  """Starts a session that also logs, summarizes and saves."""
  task.config.allow_soft_placement = True
  task.config.log_device_placement = FLAGS.log_device_placement
  hooks = [logger]
  if task.is_chief:  # After the logger, which may refuse the step.
    hooks.append(tf.train.CheckpointSaverHook(
        FLAGS.train_dir, FLAGS.save_checkpoint_secs, scaffold=scaffold))
  else:
    hooks = [*task.hooks, *hooks]
  with tf.name_scope('session'):  # One box in TensorBoard's graph.
    return tf.train.MonitoredTrainingSession(
        task.target, task.is_chief, scaffold=scaffold, config=task.config,
        # A task's own come before all others: they complete the step.
        chief_only_hooks=task.hooks, hooks=hooks, summary_dir=FLAGS.train_dir,
        save_summaries_steps=FLAGS.save_summary_steps,
        log_step_count_steps=FLAGS.save_summary_steps)


def _explain(error, dataset, task):
  """Raises a UserError instead, if the cause of an error is known."""
  cifar10_input.check_files(
      dataset, cifar10.data_folder(dataset), dataset.train_files)
  if task.is_chief and not tf.io.gfile.isdir(FLAGS.train_dir):
    raise UserError(
        f'--train_dir={FLAGS.train_dir} is no folder any more.') from error
  # "Nan in summary histogram for: X", or "Infinity in Histogram for: X".
  if 'istogram for: ' in str(error):
    raise _not_finite('a gradient') from error


def _not_finite(what):
  return UserError(
      f'{what} is not finite: lower --learning_rate (now {FLAGS.learning_rate})'
      ', or compute in float32. Started again, the run goes on from its last '
      'good checkpoint.')


_STEP_SECS = 1200  # No step takes so long, unless the files were emptied.
_ESTIMATE_SECS = 300  # From one estimate of the time that is left to the next.


class LoggerHook(tf.train.SessionRunHook):
  """Prints loss and speed every --log_frequency steps, and the time left.

  It ends the training after the last step, and refuses a loss that is not
  finite. (TensorFlow's StopAtStepHook adds one to the number before the step,
  which other tasks may have raised meanwhile.)

  Args:
    loss: scalar float32.
    steps_done: scalar int64, the global step after the step.
    examples_per_step: int.
    task: the `Task`.
  """

  def __init__(self, loss, steps_done, examples_per_step, task):
    self._fetches = [loss, steps_done]
    self._task = task
    self._examples_per_step = examples_per_step

  def after_create_session(self, session, coord):
    self.step = self._last_line = session.run(tf.train.get_global_step())
    self._next_line = FLAGS.log_frequency * math.ceil(
        self.step / FLAGS.log_frequency)
    self._last_time = time.monotonic()
    self._next_estimate = None  # The first line's speed is that of the start.

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(
        self._fetches, options=tf.RunOptions(timeout_in_ms=_STEP_SECS * 1000))

  def after_run(self, run_context, run_values):
    loss_value, self.step = run_values.results
    step = self.step - 1  # People count from 0.
    if not math.isfinite(loss_value):
      raise _not_finite(f'the loss at step {step}')
    if self._task.is_last(self.step):
      run_context.request_stop()
    if step < self._next_line:
      return
    now = time.monotonic()
    secs = (now - self._last_time) / max(1, self.step - self._last_line)
    say(f'{datetime.now()}: step {step}, loss = {loss_value:.2f} '
        f'({self._examples_per_step / secs:.1f} examples/sec; '
        f'{secs:.3f} sec/batch)')
    self._last_line, self._last_time = self.step, now
    self._next_line = (step // FLAGS.log_frequency + 1) * FLAGS.log_frequency
    self._tell_time_left(secs)

  def _tell_time_left(self, secs_per_step):
    steps_left = FLAGS.max_steps - self.step
    secs_left = round(steps_left * secs_per_step)
    if self._next_estimate is None:
      self._next_estimate = self._last_time
    elif self._last_time >= self._next_estimate and secs_left > 60:
      say(f'{steps_left} steps left, about {timedelta(seconds=secs_left)}.')
      self._next_estimate = self._last_time + _ESTIMATE_SECS

  def end(self, session):
    self.step = session.run(tf.train.get_global_step())


# What a run leaves in its folder, and how that is found again. All of it goes
# through TensorFlow's file systems, so the folder may be a URL.

# The flags that decide what a run learns.
SHAPING_FLAGS = (
    'batch_size', 'crop_margin', 'dataset', 'image_size', 'label_smoothing',
    'learning_rate', 'learning_rate_schedule', 'max_steps', 'model', 'momentum',
    'moving_average_decay', 'optimizer', 'recipe', 'use_bfloat16', 'use_fp16',
    'weight_decay')
_RUN_FILE = 'run.json'
_VERSIONS = {'tensorflow': tf.version.VERSION, 'numpy': np.__version__,
             'python': sys.version.split()[0]}


def write_run(dataset):
  """Writes all flags, the names of the classes, and versions to --train_dir."""
  values = {flag.name: flag.value for flag in _script_flags()}
  values['data_dir'] = os.path.abspath(os.path.expanduser(FLAGS.data_dir))
  run = {'flags': values, 'classes': dataset.classes, 'versions': _VERSIONS,
         'started': str(datetime.now())}
  cifar10_input.write_file(os.path.join(FLAGS.train_dir, _RUN_FILE),
                           lambda f: json.dump(run, f, indent=1))


def _script_flags():
  by_module = FLAGS.flags_by_module_dict()
  return [flag for module in _modules() for flag in by_module[module]]


def _show_run(step):
  """Shows flags and versions in TensorBoard, hyper-parameters to compare."""
  rows = [f'| --{flag.name} | {flag.value} |' for flag in sorted(
      _script_flags(), key=lambda flag: (not flag.present, flag.name))]
  rows += [f'| {name} | {version} |' for name, version in _VERSIONS.items()]
  table = '\n'.join(['| given flags first | |', '| --- | --- |', *rows])
  writer = tf.summary.FileWriterCache.get(FLAGS.train_dir)
  values = {name: FLAGS[name].value for name in SHAPING_FLAGS}
  for shown in (text.text_pb('configuration', table),
                hparams.hparams_pb(values)):
    writer.add_summary(shown.SerializeToString(), step)


def read_run(folder):
  """Returns what is known of the run in a folder: flags, `started`, `classes`.

  Without run.json, as in folders of the original, that is {}.
  """
  path = os.path.join(run_folder(folder), _RUN_FILE)
  try:
    if os.path.exists(path) and not os.path.isfile(path):
      raise ValueError('it is no regular file')  # A pipe would never end.
    with tf.io.gfile.GFile(path) as f:
      run = json.load(f)
    if not isinstance(run, dict) or not isinstance(run.get('classes'), list):
      raise ValueError('it has no list of classes')
    known = {**run['flags'], 'started': run.get('started'),
             'classes': tuple(map(str, run['classes']))}
    if not isinstance(known.get('max_steps', 0), int):
      raise ValueError('max_steps is not a whole number')
    return known
  except tf.errors.NotFoundError:
    return {}
  except (tf.errors.OpError, ValueError, KeyError, TypeError,
          RecursionError) as error:
    raise UserError(f'{path} cannot be used ({what_went_wrong(error)}): mend '
                    'it, or remove it and give the run\'s flags.') from error


def check_run():
  """Raises a UserError if the run in --train_dir is not what the flags say."""
  run = read_run(FLAGS.train_dir)
  if not run:
    say(f'{FLAGS.train_dir} has no {_RUN_FILE}: its checkpoints are taken for '
        'those of a run with these flags.')
  fixed = ('model', 'image_size', 'recipe')
  if {run.get('dataset'), FLAGS.dataset} <= set(cifar10_input.DATASETS):
    fixed += ('dataset',)  # Of folders, the classes tell.
  schedule = FLAGS.learning_rate_schedule
  if schedule != 'staircase' and run.get('learning_rate_schedule') == schedule:
    fixed += ('max_steps',)  # The learning rate would jump.
  for name in fixed:
    value = FLAGS[name].value
    if run.get(name, value) != value:
      raise UserError(
          f'{FLAGS.train_dir} was trained with --{name}={run[name]}, not '
          f'{value}: give it that flag again, or name another --train_dir.')


def check_classes(folder, dataset):
  """Raises a UserError if a data set has other classes than a folder's run."""
  known = read_run(folder).get('classes', dataset.classes)
  if known != tuple(dataset.classes):
    raise UserError(f'{folder} was trained on the classes {", ".join(known)}, '
                    f'but --dataset={dataset.name} has '
                    f'{", ".join(dataset.classes)}.')


def adopt_run(folder, names):
  """Takes defaults of flags, and the precision, from a run. Returns `read_run`.
  """
  run = read_run(folder)
  if not FLAGS['use_fp16'].present and not FLAGS['use_bfloat16'].present:
    names += ('use_fp16', 'use_bfloat16')
  for name in names:
    if run.get(name) is not None and not FLAGS[name].present:
      try:
        FLAGS.set_default(name, run[name])
      except flags.Error as error:
        raise UserError(
            f'{folder} was trained with --{name}={run[name]}, which does not '
            f'exist here ({error}): give --{name}.') from error
  return run


# Where evaluation writes, below the folder of a run: TensorBoard shows both.
EVAL_FOLDER = 'eval'

# What a run leaves, and what a save that was killed had not renamed yet.
_FILE = re.compile(
    r'(checkpoint|graph\.pbtxt|run\.json|events\.out\.tfevents\..*|'
    r'model\.ckpt-(?P<step>\d+)\.(?P<part>index|meta|data-\d+-of-\d+))'
    r'(?P<unfinished>\.(tmp[0-9a-f]*|tempstate\d+))?')


def run_folder(path):
  """Returns the folder of a run, of which a path may name one checkpoint."""
  if (not _FILE.fullmatch(os.path.basename(path) + '.index')
      or tf.io.gfile.isdir(path)):
    return path
  if not tf.io.gfile.exists(path + '.index'):
    raise UserError(f'there is no checkpoint {path}.')
  return os.path.dirname(path)


def checkpoints(path):
  """Returns the checkpoints in a folder, paths by steps, the oldest first.

  If the path names one checkpoint, that is the only one.

  The files tell, not the file `checkpoint` that lists them: that may be lost,
  behind them, or of another run. An index comes last when TensorFlow writes a
  checkpoint, and goes first when it removes one.
  """
  folder = run_folder(path)
  if folder != path:
    return {step_of(path): path}
  names = tf.io.gfile.listdir(folder) if tf.io.gfile.exists(folder) else []
  matches = filter(None, map(_FILE.fullmatch, names))
  steps = sorted(int(match['step']) for match in matches
                 if match['part'] == 'index' and not match['unfinished'])
  return {step: os.path.join(folder, 'model.ckpt-%d' % step) for step in steps}


def latest_checkpoint(folder):
  """Returns the newest acceptable checkpoint in a folder, or None."""
  for step, checkpoint in reversed(checkpoints(folder).items()):
    flaw = _flaw_of_checkpoint(checkpoint)
    if not flaw:
      return checkpoint
    if step in checkpoints(folder):  # Otherwise it was removed just now.
      say(f'{checkpoint} is damaged and passed over: {flaw}', sys.stderr)
  return None


def _flaw_of_checkpoint(checkpoint):
  """Returns why a checkpoint must not be used, or None."""
  try:
    # The reader's own errors do not tell a file that is refused from a bad one.
    for path in (checkpoint + '.index',
                 *tf.io.gfile.glob(checkpoint + '.data-*')):
      if os.path.exists(path) and not os.path.isfile(path):
        return f'{path} is no regular file'  # A pipe would never end.
      tf.io.gfile.GFile(path, 'rb').read(1)
    reader = tf.train.NewCheckpointReader(checkpoint)
    for name in reader.get_variable_to_shape_map():
      value = reader.get_tensor(name)  # Checks the CRC-32C of its bytes.
      if value.dtype.kind == 'f' and not np.isfinite(value).all():
        return f'{name} is not finite'
  except (tf.errors.PermissionDeniedError, tf.errors.ResourceExhaustedError):
    raise  # It need not be damaged.
  except Exception as error:  # An IndexError, for a file that was cut.
    return what_went_wrong(error)
  return None


def step_of(checkpoint):
  """Returns the number of steps that a checkpoint was saved after.

  Its name tells. The variable that counts steps has other names and types in
  older checkpoints, or is missing.
  """
  return int(checkpoint.rpartition('-')[2])


def check_checkpoint(checkpoint, variables):
  """Refuses a checkpoint in which a variable has another shape or type.

  `variables` is a dict from names in the checkpoint to variables to restore.
  """
  reader = tf.train.NewCheckpointReader(checkpoint)
  shapes = reader.get_variable_to_shape_map()
  dtypes = reader.get_variable_to_dtype_map()
  for name, variable in variables.items():
    there, here = shapes.get(name, 'missing'), variable.shape.as_list()
    if there == here:
      there, here = dtypes[name].name, variable.dtype.base_dtype.name
    if there != here:
      advice = ''
      if there == 'missing' and name.endswith('/ExponentialMovingAverage'):
        advice = ' --nouse_moving_average evaluates it without averages.'
      raise UserError(f'{checkpoint} does not fit the network: {name} is '
                      f'{there} there and {here} here.{advice}')


def _checkpoint_to_continue():
  """Returns the checkpoint in --train_dir to go on from, or None."""
  if FLAGS.overwrite:
    return None
  checkpoint = latest_checkpoint(FLAGS.train_dir)
  if checkpoint:
    check_run()
  elif checkpoints(FLAGS.train_dir):
    raise UserError(f'no checkpoint in --train_dir={FLAGS.train_dir} is whole: '
                    '--overwrite starts anew.')
  return checkpoint


def _say_where_it_starts(checkpoint):
  step = step_of(checkpoint)
  if step < FLAGS.max_steps:
    say(f'Continuing from {checkpoint}.')
    return
  more = ''
  if FLAGS.learning_rate_schedule == 'staircase':
    more = 'a larger --max_steps trains on, '
  say(f'{checkpoint} is trained for {step} steps already: {more}--overwrite '
      'starts anew.')


def _remove_remains():
  """Removes what a killed save left, and all of a run with --overwrite.

  Files that this suite does not write stay.
  """
  whole = checkpoints(FLAGS.train_dir)
  for name in tf.io.gfile.listdir(FLAGS.train_dir):
    path = os.path.join(FLAGS.train_dir, name)
    match = _FILE.fullmatch(name)
    if match and not tf.io.gfile.isdir(path) and (
        FLAGS.overwrite or match['unfinished']
        or match['step'] and int(match['step']) not in whole):
      tf.io.gfile.remove(path)
  if FLAGS.overwrite:  # Its evaluations, too.
    for path in tf.io.gfile.glob(os.path.join(
        FLAGS.train_dir, EVAL_FOLDER, 'events.out.tfevents.*')):
      tf.io.gfile.remove(path)


# Flags. A script defines its own before it parses them, and no others: so
# evaluation refuses what only training knows.


class PathParser(flags.ArgumentParser):
  """Takes what TensorFlow can write to: a path, made absolute, or a URL."""

  def parse(self, argument):
    scheme, _, path = argument.rpartition('://')
    if scheme and scheme not in tf.io.gfile.get_registered_schemes():
      raise ValueError(f'TensorFlow knows no file system {scheme}://')
    if re.search(r'[][*?]', argument) or os.sep == '/' and '\\' in argument:
      raise ValueError(r'must do without * ? [ ] \, which mean something else '
                       'to TensorFlow')
    if not argument or scheme and not path.strip('/'):
      raise ValueError('names neither a folder nor a file')
    if scheme == 'file' and not path.startswith('/'):
      raise ValueError('file:// needs an absolute path')
    if scheme not in ('', 'file'):
      return argument
    return os.path.abspath(os.path.expanduser(path))


class _FiniteParser(flags.FloatParser):
  """Refuses nan and inf, which no bound does."""

  def convert(self, argument):
    value = super().convert(argument)
    if not math.isfinite(value):
      raise ValueError(f'{argument} is not a finite number')
    return value


def _define_float(name, default, help, upper_bound=None):
  flags.DEFINE(_FiniteParser(0.0, upper_bound), name, default, help)


def count_parser(lower_bound=1, upper_bound=2 ** 31 - 1):
  """Returns a parser of whole numbers that TensorFlow can carry."""
  return flags.IntegerParser(lower_bound, upper_bound)


class _DatasetParser(flags.ArgumentParser):
  """Takes the name of a known data set, or the path of a folder."""
  syntactic_help = ', '.join(sorted(cifar10_input.DATASETS)) + ', or a folder'

  def parse(self, argument):
    if argument in cifar10_input.DATASETS:
      return argument
    folder = os.path.abspath(os.path.expanduser(argument))
    if not os.path.isdir(folder):
      raise ValueError('must be ' + self.syntactic_help)
    return folder


def define_data_flags():
  """Defines what all scripts know of data and network."""
  flags.DEFINE(
      _DatasetParser(), 'dataset', 'cifar10', 'What to learn from: '
      f'{_DatasetParser.syntactic_help} with pictures in train/CLASS/ and '
      'test/CLASS/, or with records in *.bin and test*.bin.')
  flags.DEFINE_string(
      'data_url', None, 'Another address (http, https or file) of the archive '
      "of the data set, or of the folder with svhn's files.")
  flags.DEFINE_enum(
      'model', 'default', ['default', 'local'], 'The network: with two fully '
      'connected layers, or with two locally connected ones.')
  flags.DEFINE(
      count_parser(8, 32), 'image_size', cifar10_input.IMAGE_SIZE,
      'Pixels of each side of a picture, of 32, that the network sees.')
  flags.DEFINE_boolean(
      'use_bfloat16', False, 'Compute activations in bfloat16, on GPUs and on '
      'CPUs with AVX512-BF16 or AMX; variables and losses stay in float32.')
  flags.mark_bool_flags_as_mutual_exclusive(['use_fp16', 'use_bfloat16'])


def define_flags():
  """Defines the flags of training."""
  define_data_flags()
  _define_run_flags()
  _define_recipe_flags()
  _define_float(
      'min_fraction_of_examples_in_queue',
      cifar10_input.MIN_FRACTION_OF_EXAMPLES_IN_QUEUE,
      'How much of an epoch stays in the shuffle queue.', upper_bound=1.0)
  flags.DEFINE(count_parser(0), 'seed', None,
               'Draw the same initial weights in each run.')
  flags.DEFINE_boolean(
      'deterministic', False, 'With --seed, do all else the same in each run, '
      'too: it ends with the same variables, byte for byte.')
  flags.register_multi_flags_validator(
      ['deterministic', 'seed'],
      lambda values: values['seed'] is not None or not values['deterministic'],
      '--deterministic needs a --seed')


def _define_run_flags():
  flags.DEFINE(PathParser(), 'train_dir', '/tmp/cifar10_train',
               'Where checkpoints and event files are written.')
  flags.DEFINE_boolean(
      'overwrite', False, 'Start anew: remove the checkpoints and event files '
      'of an earlier run in --train_dir.')
  flags.DEFINE(count_parser(), 'max_steps', 100000,
               'Steps to train for, those of earlier runs included.')
  flags.DEFINE(count_parser(), 'log_frequency', 10,
               'Steps from one line on the console to the next.')
  flags.DEFINE(count_parser(), 'save_summary_steps', 100,
               'Steps from one set of summaries to the next.')
  flags.DEFINE(count_parser(), 'save_checkpoint_secs', 600,
               'Seconds from one checkpoint to the next.')
  flags.DEFINE(count_parser(0), 'max_to_keep', 5,
               'How many of the latest checkpoints are kept; 0 keeps all.')
  flags.DEFINE_boolean('log_device_placement', False,
                       'Show which device each operation is on.')


def _define_recipe_flags():
  flags.DEFINE_enum(
      'recipe', 'original', list(cifar10.RECIPES), 'Changes the defaults of '
      f'other flags: {json.dumps(cifar10.RECIPES)}')
  _define_float('learning_rate', cifar10.INITIAL_LEARNING_RATE,
                'At the first step.')
  flags.DEFINE_enum(
      'learning_rate_schedule', 'staircase', ['staircase', 'linear', 'cosine'],
      'How it falls: tenfold every 350 epochs, or to zero at --max_steps.')
  flags.DEFINE(count_parser(0, 16), 'crop_margin', 0, 'Pixels by which random '
               'crops may leave a picture, whose edge goes on there.')
  _define_float('momentum', 0.0, "Nesterov's, of the gradients.", 1.0)
  flags.DEFINE_enum('optimizer', 'descent', ['descent', 'muon'], 'What turns '
                    'gradients into updates: Muon makes them even.')
  _define_float('label_smoothing', 0.0, 'Share of labels all classes get.', 1.0)
  _define_float('weight_decay', cifar10.WEIGHT_DECAY,
                'Factor of the L2 losses of local3 and local4.')
  _define_float('moving_average_decay', cifar10.MOVING_AVERAGE_DECAY,
                'Of the averages of the variables, which are evaluated.', 1.0)


# The place in a cluster.


def read_cluster():
  """Returns the jobs in TF_CONFIG, and the job and the index of this task.

  The jobs are a dict from names to lists of addresses. They are empty where no
  other task computes: that is one machine, and trains as one.
  """
  if not os.environ.get('TF_CONFIG'):
    return {}, None, 0
  try:
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    jobs = resolver.cluster_spec().as_dict()
    job, index = resolver.task_type, resolver.task_id or 0
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f'TF_CONFIG cannot be read: {error}') from error
  if job == 'evaluator':
    raise UserError('TF_CONFIG says that this is the evaluator, which is '
                    'cifar10_eval.py.')
  jobs.pop('evaluator', None)  # It is beside the cluster.
  if jobs.keys() <= {'chief', 'master', 'worker'} and sum(
      map(len, jobs.values())) <= 1:
    jobs = {}
  return jobs, job, index


# How a script starts and ends.


def run_script(main, define_flags):
  """Parses the flags, runs a script's `main(argv)` and exits with its result.

  What a user can mend, and what the system refuses, is one line on stderr:
  exit code 2 for flags, 1 for all else. Ctrl-C gives 130, SIGTERM 143, and a
  terminal that is closed 129.
  """
  with handling_signals(_interrupt):
    try:
      argv = parse_flags(define_flags)
      if argv[1:] and not ('predict' in FLAGS and FLAGS.predict):
        raise flags.Error(f'what is {argv[1]!r}? Flags look like --name=value')
      _leave(main(argv))
    except flags.Error as error:
      fail(2, str(error).replace('\n', '; '))
    except (UserError, OSError, tf.errors.OpError) as error:
      fail(1, what_went_wrong(error))
    except KeyboardInterrupt as interruption:
      signum, = interruption.args
      fail(128 + signum, f'stopped by {signum.name}.')


def parse_flags(define_flags):
  """Returns the arguments that are not flags. --help ends the program."""
  _forget_flags()
  others = set(FLAGS)
  cifar10.define_flags()
  define_flags()
  flags.DEFINE_boolean('help', False, 'Show all flags.', short_name='h')
  cifar10.script_flags.update(set(FLAGS) - others)
  try:
    for argument in sys.argv:
      argument.encode()
    argv = FLAGS(sys.argv)
  except UnicodeEncodeError as error:
    raise flags.Error(f'{error.object} is not UTF-8, which names of folders '
                      'have to be for TensorFlow') from error
  except ValueError as error:  # As for --norun_once=1.
    raise flags.Error(error) from error
  if FLAGS.help:
    help_text = '\n'.join([sys.modules['__main__'].__doc__ or '',
                           *map(FLAGS.module_help, _modules())])
    for line in help_text.splitlines():
      say(line)
    _leave(0)
  if 'recipe' in FLAGS:
    for name, value in cifar10.RECIPES[FLAGS.recipe].items():
      FLAGS.set_default(name, value)
  return argv


def _forget_flags():
  """Removes the flags of a script that ran before, as it happens in notebooks.

  And those of absl that do nothing in a program which absl does not start.
  """
  names = {flag.name for module in ('cifar10', 'absl.app')
           for flag in FLAGS.get_flags_for_module(module)}
  for name in (names | cifar10.script_flags) & set(FLAGS):
    delattr(FLAGS, name)


def _modules():
  """Returns absl's names of the modules of our flags, the script's first.

  A script may have any name, so all others are told by theirs.
  """
  return [module for module in reversed(FLAGS.flags_by_module_dict())
          if module.split('.')[0] not in ('absl', 'tensorflow', 'keras')]


def fail(code, message):
  """Ends the process with one line on stderr."""
  say(f'{os.path.basename(sys.argv[0])}: {message}', sys.stderr)
  _leave(code)


def _leave(code):
  if os.environ.get('TF_CONFIG'):  # A server would keep Python from its exit.
    if sys.stdout:  # It may be closed.
      sys.stdout.flush()
    os._exit(code or 0)
  sys.exit(code)


@contextlib.contextmanager
def handling_signals(handler):
  """Calls a handler at the first signal to end; a second ends the process.

  Threads other than the main one get no signals, and so have nothing to handle.
  """
  def handle_once(signum, frame):
    signal.signal(signum, signal.SIG_DFL)
    handler(signal.Signals(signum))

  earlier = {}
  if threading.current_thread() is threading.main_thread():
    signums = {signal.SIGINT, signal.SIGTERM,
               getattr(signal, 'SIGHUP', signal.SIGTERM)}  # Not on Windows.
    # What is ignored is so with reason: by nohup, or behind a script's `&`.
    earlier = {s: signal.signal(s, handle_once) for s in signums
               if signal.getsignal(s) != signal.SIG_IGN}
  try:
    yield
  finally:
    for signum, its_handler in earlier.items():
      signal.signal(signum, its_handler)


def _interrupt(signum):
  raise KeyboardInterrupt(signum)


def main(argv=None):
  jobs, *_ = read_cluster()
  if jobs:
    raise UserError('TF_CONFIG describes a cluster, on which '
                    'cifar10_multi_gpu_train.py trains.')
  return train()


if __name__ == '__main__':
  run_script(main, define_flags)

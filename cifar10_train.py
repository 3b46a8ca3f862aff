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
from datetime import datetime
import json
import math
import os
import re
import signal
import sys
import time

import numpy as np

import cifar10_input  # Before TensorFlow, whose start-up chatter it hides.
import tensorflow.compat.v1 as tf

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
    images, labels = distorted_inputs(dataset, FLAGS.batch_size)
  logits = cifar10.inference(images, recipe)
  loss = cifar10.loss(logits, labels, recipe=recipe)
  return cifar10.train(loss, global_step, recipe), loss


# What the flags say, as values.


def distorted_inputs(dataset, batch_size):
  """Builds the input of training; see `cifar10.distorted_inputs`."""
  return cifar10.distorted_inputs(
      dataset, batch_size, image_size=FLAGS.image_size,
      min_fraction_of_examples_in_queue=FLAGS.min_fraction_of_examples_in_queue,
      deterministic=FLAGS.deterministic)


def prepare_dataset():
  """Returns the data set that --dataset names, after a download if need be."""
  if FLAGS.dataset not in cifar10_input.DATASETS:
    return cifar10_input.own_pictures(FLAGS.dataset, FLAGS.data_dir)
  dataset = cifar10_input.DATASETS[FLAGS.dataset]
  cifar10.maybe_download_and_extract(dataset, FLAGS.data_url, FLAGS.data_sha256)
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


@dataclasses.dataclass
class Task:
  """What this process is in a training; by default, all of it."""
  worker: int = 0         # Index among all workers; the chief has 0. It alone
                          # writes to --train_dir.
  num_workers: int = 1    # Workers that share each step.
  target: str = ''        # What a session connects to.
  device: object = None   # Where operations go, for `tf.device`.
  hooks: tuple = ()       # Hooks that the session must have.
  config: tf.ConfigProto = dataclasses.field(default_factory=tf.ConfigProto)

  @property
  def is_chief(self):
    return self.worker == 0


def run_training(build, examples, task=None):
  """Trains until --max_steps, or until something else ends it.

  Args:
    build: function that builds a step, as `build_step` does.
    examples: images that this process learns from in a step.
    task: the `Task` of this process.

  Returns:
    The exit code: 0, or 128 and the number of the signal.
  """
  task = task or Task()
  with (cifar10_input.locked(FLAGS.train_dir, 'train_dir') if task.is_chief
        else contextlib.nullcontext()):
    checkpoint = _checkpoint_to_continue()
    if checkpoint and _is_trained(checkpoint):
      return 0
    dataset = prepare_dataset()
    if checkpoint:
      check_classes(FLAGS.train_dir, dataset)
    if examples > dataset.num_train_examples:
      raise UserError(f'a step of {examples} images is more than the '
                      f'{dataset.num_train_examples} there are: lower '
                      '--batch_size.')
    if FLAGS.use_fp16 and not tf.config.list_physical_devices('GPU'):
      tf.logging.warn('--use_fp16 is for GPUs: on a CPU it is slow.')
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
  with tf.name_scope('train/'), tf.control_dependencies([train_op]):
    steps_done = tf.identity(global_step.read_value(), name='steps_done')
  if checkpoint:
    check_checkpoint(checkpoint, {v.op.name: v for v in tf.global_variables()})
  if task.is_chief:
    _tidy_train_dir()
    write_run(dataset)
  logger = LoggerHook(loss, steps_done, examples_per_step, FLAGS.log_frequency)
  signals = []  # Those that came.
  try:
    with _session(checkpoint, task, logger) as session:
      handle_signals(signals.append)  # Before, a signal ends the process.
      while not session.should_stop() and not signals:
        session.run(train_op)
  except (tf.errors.OpError, ValueError) as error:
    _explain(error, dataset)
    raise
  if signals and logger.step < FLAGS.max_steps:
    saved = ' with a checkpoint' if task.is_chief else ''
    say(f'Stopped by {signals[0].name}{saved}: the same command continues.')
    return 128 + signals[0]
  if logger.step < FLAGS.max_steps:
    raise UserError(f'the input ended at step {logger.step}: has a file of the '
                    'data set changed?')
  return 0


def _session(checkpoint, task, logger):
  """Starts a session, which first restores a checkpoint if there is one."""
  saver = tf.train.Saver(
      max_to_keep=FLAGS.max_to_keep,
      save_relative_paths=True)  # So that --train_dir may be moved.
  scaffold = tf.train.Scaffold(saver=saver)
  task.config.allow_soft_placement = True
  task.config.log_device_placement = FLAGS.log_device_placement
  hooks = [tf.train.StopAtStepHook(last_step=FLAGS.max_steps), logger]
  if task.is_chief:
    creator = tf.train.ChiefSessionCreator(
        scaffold, task.target, task.config,
        checkpoint_filename_with_path=checkpoint)
    hooks += [
        tf.train.StepCounterHook(
            FLAGS.save_summary_steps, output_dir=FLAGS.train_dir),
        tf.train.SummarySaverHook(
            FLAGS.save_summary_steps, output_dir=FLAGS.train_dir,
            scaffold=scaffold),
        tf.train.CheckpointSaverHook(
            FLAGS.train_dir, FLAGS.save_checkpoint_secs, scaffold=scaffold)]
    if checkpoint:  # The saver is to remove older ones, as it adds new ones.
      older = list(checkpoints(FLAGS.train_dir).values())
      saver.recover_last_checkpoints(older[:older.index(checkpoint) + 1])
  else:
    creator = tf.train.WorkerSessionCreator(scaffold, task.target, task.config)
  with tf.name_scope('session'):  # One box in TensorBoard's graph.
    return tf.train.MonitoredSession(creator, [*hooks, *task.hooks])


def _explain(error, dataset):
  """Raises a UserError instead, if the cause of an error is known."""
  cifar10_input.check_files(
      dataset, cifar10.data_folder(dataset), dataset.train_files)
  if not tf.io.gfile.isdir(FLAGS.train_dir):
    raise UserError(
        f'--train_dir={FLAGS.train_dir} is no folder any more.') from error
  # "Nan in summary histogram for: X", or "Infinity in Histogram for: X".
  if 'istogram for: ' in str(error):
    raise UserError('a gradient ' + _NOT_FINITE) from error


_NOT_FINITE = (
    'is not finite: start again to go on from the last good checkpoint. If it '
    'happens again, lower --learning_rate, or compute in float32.')


class LoggerHook(tf.train.SessionRunHook):
  """Prints loss and speed now and then, and refuses a loss that is not finite.

  Args:
    loss: scalar float32.
    steps_done: scalar int64, the global step after the step.
    examples_per_step: int.
    log_frequency: int, steps from one line to the next.
  """

  def __init__(self, loss, steps_done, examples_per_step, log_frequency):
    self._fetches = [loss, steps_done]
    self._examples_per_step = examples_per_step
    self._log_frequency = log_frequency

  def after_create_session(self, session, coord):
    self.step = self._last_line = session.run(tf.train.get_global_step())
    self._next_line = self._log_frequency * math.ceil(
        self.step / self._log_frequency)
    self._last_time = time.time()

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(
        self._fetches, options=tf.RunOptions(timeout_in_ms=1200000))

  def after_run(self, run_context, run_values):
    loss_value, self.step = run_values.results
    step = self.step - 1  # People count from 0.
    if not math.isfinite(loss_value):
      raise UserError(f'the loss at step {step} {_NOT_FINITE}')
    if step < self._next_line:
      return
    secs = (time.time() - self._last_time) / max(1, self.step - self._last_line)
    say(f'{datetime.now()}: step {step}, loss = {loss_value:.2f} '
        f'({self._examples_per_step / secs:.1f} examples/sec; '
        f'{secs:.3f} sec/batch)')
    self._last_line, self._last_time = self.step, time.time()
    self._next_line = (step // self._log_frequency + 1) * self._log_frequency

  def end(self, session):
    self.step = session.run(tf.train.get_global_step())


# What a run leaves in its folder, and how that is found again. All of it goes
# through TensorFlow's file systems, so the folder may be a URL.

_RUN_FILE = 'run.json'


def write_run(dataset):
  """Writes all flags, the names of the classes, and versions to --train_dir."""
  by_module = FLAGS.flags_by_module_dict()
  values = {flag.name: flag.value
            for module in _modules() for flag in by_module[module]}
  values['data_dir'] = os.path.abspath(os.path.expanduser(FLAGS.data_dir))
  versions = {'tensorflow': tf.version.VERSION, 'numpy': np.__version__,
              'python': sys.version.split()[0]}
  path = os.path.join(FLAGS.train_dir, _RUN_FILE)
  with tf.io.gfile.GFile(path + '.tmp', 'w') as f:  # Nobody reads half a file.
    json.dump({'flags': values, 'classes': dataset.classes,
               'versions': versions}, f, indent=1)
  tf.io.gfile.rename(path + '.tmp', path, overwrite=True)


def read_run(folder):
  """Returns what is known of the run in a folder: its flags, and `classes`.

  Without run.json, as in folders of the original, that is {}.
  """
  path = os.path.join(folder, _RUN_FILE)
  try:
    with tf.io.gfile.GFile(path) as f:
      run = json.load(f)
    values = dict(run['flags'])
    if 'classes' in run:
      values['classes'] = tuple(map(str, run['classes']))
    if not isinstance(values.get('max_steps', 0), int):
      raise ValueError('max_steps is not a whole number')
    return values
  except tf.errors.NotFoundError:
    return {}
  except (tf.errors.OpError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} cannot be used ({what_went_wrong(error)}): mend '
                    'it, or remove it and give the run\'s flags.') from error


def check_run():
  """Raises a UserError if the run in --train_dir is not what the flags say."""
  run = read_run(FLAGS.train_dir)
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
  """Makes flags of a run, and its precision, defaults. Returns `read_run`."""
  run = read_run(folder)
  if not FLAGS['use_fp16'].present and not FLAGS['use_bfloat16'].present:
    names += ('use_fp16', 'use_bfloat16')
  for name in names:
    if name in run and not FLAGS[name].present:
      try:
        FLAGS.set_default(name, run[name])
      except flags.Error as error:
        raise UserError(
            f'{folder} was trained with --{name}={run[name]}, which is not to '
            f'be had now ({error}): give --{name}.') from error
  return run


# What a run leaves, and what a save that was killed had not renamed yet.
_FILE = re.compile(
    r'(checkpoint|graph\.pbtxt|run\.json|events\.out\.tfevents\..*|'
    r'model\.ckpt-(?P<step>\d+)\.(?P<part>index|meta|data-\d+-of-\d+))'
    r'(?P<unfinished>\.(tmp[0-9a-f]*|tempstate\d+))?')


def checkpoints(folder):
  """Returns the checkpoints in a folder, paths by steps, the oldest first.

  The files tell, not the file `checkpoint` that lists them: that may be lost,
  behind them, or of another run. An index comes last when TensorFlow writes a
  checkpoint, and goes first when it removes one.
  """
  names = tf.io.gfile.listdir(folder) if tf.io.gfile.exists(folder) else []
  matches = filter(None, map(_FILE.fullmatch, names))
  steps = sorted(int(match['step']) for match in matches
                 if match['part'] == 'index' and not match['unfinished'])
  return {step: os.path.join(folder, 'model.ckpt-%d' % step) for step in steps}


def latest_checkpoint(folder):
  """Returns the newest acceptable checkpoint in a folder, or None."""
  for step, checkpoint in reversed(checkpoints(folder).items()):
    flaw = _find_flaw(checkpoint)
    if not flaw:
      return checkpoint
    if step in checkpoints(folder):  # Otherwise it was removed just now.
      say(f'{checkpoint} is damaged and passed over: {flaw}', sys.stderr)
  return None


def _find_flaw(checkpoint):
  """Returns why a checkpoint must not be used, or None."""
  try:
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


def read_step(checkpoint):
  """Returns the number of steps that a checkpoint was saved after."""
  reader = tf.train.NewCheckpointReader(checkpoint)
  return reader.get_tensor(tf.GraphKeys.GLOBAL_STEP)


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
      raise UserError(f'{checkpoint} does not fit the network: {name} is '
                      f'{there} there and {here} here.')


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


def _is_trained(checkpoint):
  """Says where training starts. Returns whether no step is left to do."""
  step = read_step(checkpoint)
  if step < FLAGS.max_steps:
    say(f'Continuing from {checkpoint}.')
    return False
  more = ''
  if FLAGS.learning_rate_schedule == 'staircase':
    more = 'a larger --max_steps trains on, '
  say(f'{checkpoint} is trained for {step} steps already: {more}--overwrite '
      'starts anew.')
  return True


def _tidy_train_dir():
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


# Flags. A script defines its own before it parses them, and no others: so
# evaluation refuses what only training knows.


class FolderParser(flags.ArgumentParser):
  """Makes of a flag a folder that TensorFlow can write to: a path or a URL."""

  def parse(self, argument):
    scheme, _, path = argument.rpartition('://')
    if scheme and scheme not in tf.io.gfile.get_registered_schemes():
      raise ValueError(f'TensorFlow knows no file system {scheme}://')
    if re.search(r'[][*?]', argument) or os.sep == '/' and '\\' in argument:
      raise ValueError(r'must do without * ? [ ] \, which mean something else '
                       'to TensorFlow')
    if scheme == 'file':
      path = path.removeprefix('localhost')
      if not path.startswith('/'):
        raise ValueError('file:// needs an absolute path')
    if scheme and not path.strip('/'):
      raise ValueError('names no folder')
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


class _DatasetParser(flags.ArgumentParser):
  """Takes the name of a known data set, or the path of a folder."""
  syntactic_help = '%s, or a folder with pictures' % ', '.join(
      sorted(cifar10_input.DATASETS))

  def parse(self, argument):
    folder = os.path.abspath(os.path.expanduser(argument))
    if argument not in cifar10_input.DATASETS and not os.path.isdir(folder):
      raise ValueError('must be ' + self.syntactic_help)
    return argument if argument in cifar10_input.DATASETS else folder


def define_data_flags():
  """Defines what all scripts know of data and network."""
  flags.DEFINE(
      _DatasetParser(), 'dataset', 'cifar10', 'What to learn from: '
      f'{_DatasetParser.syntactic_help} in train/CLASS/ and test/CLASS/.')
  flags.DEFINE_string(
      'data_url', None, 'Another place to download the archive of the data set '
      'from (http, https or file).')
  flags.DEFINE_string(
      'data_sha256', None, 'Its checksum, if it is not the published archive.')
  flags.DEFINE_enum(
      'model', 'default', ['default', 'local'], 'The network: with two fully '
      'connected layers, or with two locally connected ones.')
  flags.DEFINE_integer(
      'image_size', cifar10_input.IMAGE_SIZE, 'Pixels of each side of a '
      'picture, of 32, that the network sees.', lower_bound=8, upper_bound=32)
  flags.DEFINE_boolean(
      'use_bfloat16', False, 'Compute activations in bfloat16, on GPUs and on '
      'CPUs with AVX512-BF16 or AMX; variables and losses stay in float32.')
  flags.mark_bool_flags_as_mutual_exclusive(['use_fp16', 'use_bfloat16'])
  flags.register_validator(
      'data_url', lambda url: not url or re.match('(https?|file)://', url),
      'must start with http://, https:// or file://')
  flags.register_validator(
      'data_sha256',
      lambda sha256: not sha256 or re.fullmatch('[0-9a-fA-F]{64}', sha256),
      'must be 64 hexadecimal digits')


def define_flags():
  """Defines the flags of training."""
  define_data_flags()
  _define_run_flags()
  _define_recipe_flags()
  _define_float(
      'min_fraction_of_examples_in_queue',
      cifar10_input.MIN_FRACTION_OF_EXAMPLES_IN_QUEUE,
      'How much of an epoch stays in the shuffle queue.', upper_bound=1.0)
  flags.DEFINE_integer(
      'seed', None, 'Draw the same initial weights in each run.', lower_bound=0,
      upper_bound=2 ** 31 - 1)
  flags.DEFINE_boolean(
      'deterministic', False, 'With --seed, do all else the same in each run, '
      'too: it ends with the same variables, byte for byte.')
  flags.register_multi_flags_validator(
      ['deterministic', 'seed'],
      lambda values: values['seed'] is not None or not values['deterministic'],
      '--deterministic needs a --seed')


def _define_run_flags():
  flags.DEFINE(FolderParser(), 'train_dir', '/tmp/cifar10_train',
               'Where checkpoints and event files are written.')
  flags.DEFINE_boolean(
      'overwrite', False, 'Start anew: remove the checkpoints and event files '
      'of an earlier run in --train_dir.')
  flags.DEFINE_integer('max_steps', 100000, 'Steps to train for, those of '
                       'earlier runs included.', lower_bound=1)
  flags.DEFINE_integer('log_frequency', 10, 'Steps from one line on the '
                       'console to the next.', lower_bound=1)
  flags.DEFINE_integer('save_summary_steps', 100, 'Steps from one set of '
                       'summaries to the next.', lower_bound=1)
  flags.DEFINE_integer('save_checkpoint_secs', 600, 'Seconds from one '
                       'checkpoint to the next.', lower_bound=1)
  flags.DEFINE_integer('max_to_keep', 5, 'How many of the latest checkpoints '
                       'are kept; 0 keeps all.', lower_bound=0)
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
  _define_float('momentum', 0.0, "Nesterov's, of the gradients.", 1.0)
  flags.DEFINE_enum('optimizer', 'descent', ['descent', 'muon'], 'What turns '
                    'gradients into updates: Muon makes them even.')
  _define_float('label_smoothing', 0.0, 'Share of labels all classes get.', 1.0)
  _define_float('weight_decay', cifar10.WEIGHT_DECAY,
                'Factor of the L2 losses of local3 and local4.')
  _define_float('moving_average_decay', cifar10.MOVING_AVERAGE_DECAY,
                'Of the averages of the variables, which are evaluated.', 1.0)


# How a script starts and ends.


def run_script(main, define_flags):
  """Parses the flags, runs a script's `main(argv)` and exits with its result.

  What a user can mend, and what the system refuses, is one line on stderr:
  exit code 2 for flags, 1 for all else. Ctrl-C gives 130, SIGTERM 143, and a
  terminal that is closed 129.
  """
  handle_signals(_interrupt)
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
  define_flags()
  flags.DEFINE_boolean('help', False, 'Show all flags.', short_name='h')
  try:
    argv = FLAGS(sys.argv)
  except ValueError as error:  # As for --norun_once=1.
    raise flags.Error(error) from error
  if FLAGS.help:
    say(sys.modules['__main__'].__doc__)
    say('\n'.join(map(FLAGS.module_help, _modules())))
    _leave(0)
  if 'recipe' in FLAGS:
    for name, value in cifar10.RECIPES[FLAGS.recipe].items():
      FLAGS.set_default(name, value)
  return argv


def _modules():
  """Returns absl's names of the modules of our flags, the script's first."""
  return [module for module in reversed(FLAGS.flags_by_module_dict())
          if os.path.basename(module).startswith('cifar10')]


def fail(code, message):
  """Ends the process with one line on stderr."""
  say(f'{os.path.basename(sys.argv[0])}: {message}', sys.stderr)
  _leave(code)


def _leave(code):
  if os.environ.get('TF_CONFIG'):  # A server would keep Python from its exit.
    sys.stdout.flush()
    os._exit(code or 0)
  sys.exit(code)


def handle_signals(handler):
  """Calls a handler at the first signal to end; a second ends the process."""
  def handle_once(signum, frame):
    signal.signal(signum, signal.SIG_DFL)
    handler(signal.Signals(signum))

  signal.signal(signal.SIGINT, handle_once)
  signal.signal(signal.SIGTERM, handle_once)
  # Windows has no SIGHUP, and nohup ignores it with reason.
  sighup = getattr(signal, 'SIGHUP', None)
  if sighup and signal.getsignal(sighup) != signal.SIG_IGN:
    signal.signal(sighup, handle_once)


def _interrupt(signum):
  raise KeyboardInterrupt(signum)


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


def main(argv=None):
  jobs, *_ = read_cluster()
  if jobs:
    raise UserError('TF_CONFIG describes a cluster, on which '
                    'cifar10_multi_gpu_train.py trains.')
  return train()


if __name__ == '__main__':
  run_script(main, define_flags)

"""Train the CIFAR-10 network on one device.

    python cifar10_train.py         # CIFAR-10, 100,000 steps
    python cifar10_train.py --dataset=synthetic --train_dir=/tmp/synthetic_train

The second command needs no download; each data set needs its own --train_dir.

A run that ended, whatever ended it, continues from its last checkpoint in
--train_dir when it is started again. Ctrl-C, SIGTERM and SIGHUP save one first.
While it trains, cifar10_eval.py tells how well the network does, and
`tensorboard --logdir=/tmp/cifar10_train` shows what goes on inside.
"""
from datetime import datetime
import contextlib
import math
import os
import re
import sys
import time

import cifar10
import cifar10_input
from cifar10_input import UserError, say, tf

FLAGS = tf.flags.FLAGS

cifar10.define_flags()
tf.flags.DEFINE_string(
    'train_dir', '/tmp/cifar10_train',
    'Where checkpoints and event files are written.')
cifar10.refuse_patterns('train_dir')
tf.flags.DEFINE_boolean(
    'overwrite', False, 'Start anew: remove the checkpoints and event files of '
    'an earlier run in --train_dir.')
tf.flags.DEFINE_float(
    'learning_rate', cifar10.INITIAL_LEARNING_RATE, 'At the first step.',
    lower_bound=0.0, module_name=cifar10.RECIPE)
tf.flags.DEFINE_enum(
    'learning_rate_schedule', cifar10.LEARNING_RATE_SCHEDULE,
    ['staircase', 'linear', 'cosine'],
    'How it falls: tenfold every 350 epochs, or to zero at --max_steps.',
    module_name=cifar10.RECIPE)
tf.flags.DEFINE_float(
    'momentum', cifar10.MOMENTUM, 'Of the gradients.', lower_bound=0.0,
    upper_bound=1.0, module_name=cifar10.RECIPE)
tf.flags.DEFINE_float(
    'weight_decay', cifar10.WEIGHT_DECAY,
    'Factor of the L2 losses of local3 and local4.', lower_bound=0.0,
    module_name=cifar10.RECIPE)
tf.flags.DEFINE_float(
    'moving_average_decay', cifar10.MOVING_AVERAGE_DECAY,
    'Of the averages of the variables, which are evaluated.', lower_bound=0.0,
    upper_bound=1.0, module_name=cifar10.RECIPE)
tf.flags.DEFINE_float(
    'min_fraction_of_examples_in_queue',
    cifar10_input.MIN_FRACTION_OF_EXAMPLES_IN_QUEUE, 'How much of an epoch is '
    'in the shuffle queue when it is drawn from.', lower_bound=0.0,
    upper_bound=1.0)
tf.flags.DEFINE_integer(
    'max_steps', 100000, 'Steps to train for, those of earlier runs included.',
    lower_bound=1)
tf.flags.DEFINE_integer(
    'log_frequency', 10, 'Steps from one line on the console to the next.',
    lower_bound=1)
tf.flags.DEFINE_integer(
    'save_checkpoint_secs', 600, 'Seconds from one checkpoint to the next.',
    lower_bound=1)
tf.flags.DEFINE_integer(
    'max_to_keep', 5, 'How many of the latest checkpoints are kept; 0 keeps '
    'all.', lower_bound=0)
tf.flags.DEFINE_float(
    'keep_checkpoint_every_n_hours', 10000.0, 'Hours from one to the next of '
    'those checkpoints that are kept for ever.', lower_bound=0.0)
tf.flags.DEFINE_integer(
    'save_summary_steps', 100, 'Steps from one set of summaries to the next.',
    lower_bound=1)
tf.flags.DEFINE_integer(
    'seed', None, 'Draw the same initial weights in each run.', lower_bound=0,
    upper_bound=2 ** 31 - 1)
tf.flags.DEFINE_boolean(
    'deterministic', False, 'With --seed, do all else the same in each run, '
    'too: it ends with the same variables, byte for byte.')
tf.flags.register_multi_flags_validator(
    ['deterministic', 'seed'],
    lambda flags: flags['seed'] is not None or not flags['deterministic'],
    '--deterministic needs a --seed')
tf.flags.DEFINE_integer(
    'num_preprocess_threads', None, 'Threads that distort images; by default '
    'one for every four processors.', lower_bound=1, upper_bound=256)
tf.flags.DEFINE_boolean(
    'log_device_placement', False, 'Show which device each operation is on.')


def train():
  """Trains on one device. Returns the exit code."""
  return run_training(build_step, FLAGS.batch_size)


def build_step(dataset, global_step):
  """Builds one step of training on one device.

  Args:
    dataset: the `cifar10_input.Dataset` to learn from.
    global_step: int64 variable, the number of steps done.

  Returns:
    The operation that does the step, and its loss, a scalar float32.
  """
  # The input belongs on the CPU, so that a GPU is left to the network.
  with tf.device('/cpu:0'):
    images, labels = cifar10.distorted_inputs(dataset)
  logits = cifar10.inference(images, len(dataset.classes))
  loss = cifar10.loss(logits, labels)
  return cifar10.train(loss, global_step, dataset), loss


def run_training(build, examples_per_step):
  """Trains until --max_steps, or until something else ends it.

  Args:
    build: function that builds a step, as `build_step` does.
    examples_per_step: images that one step learns from, over all towers.

  Returns:
    The exit code: 0, or 128 and the number of the signal.

  Raises:
    UserError: --train_dir cannot be used, another process uses it, or it holds
      the checkpoint of another network; the loss is not a number any more; a
      file of the data set has changed; the last checkpoint was not written.
  """
  with cifar10_input.locked(FLAGS.train_dir, 'train_dir') as is_held, \
      tf.Graph().as_default():
    checkpoint = _checkpoint_to_continue()
    if checkpoint:
      cifar10.check_run(FLAGS.train_dir)
    if _already_trained(checkpoint):
      return 0
    dataset = cifar10.prepare_dataset()
    tf.set_random_seed(FLAGS.seed)
    if FLAGS.deterministic:
      tf.compat.v2.config.experimental.enable_op_determinism()
    train_op, loss = build(dataset, tf.train.get_or_create_global_step())
    if checkpoint:
      cifar10.check_checkpoint(
          checkpoint, {v.op.name: v for v in tf.global_variables()})
    _tidy(checkpoint)
    saver = Saver()
    def check():
      if not is_held():
        raise UserError('--train_dir=%s was removed.' % FLAGS.train_dir)
      cifar10.check_files(dataset, dataset.train_files)

    logger, stop = LoggerHook(loss, examples_per_step), StopHook(check)
    try:
      with _session(saver, [stop, logger]) as session:
        while not session.should_stop():
          session.run(train_op)
    except tf.errors.OpError as error:
      check()  # If a file of the data set is the cause, this names it.
      if 'HistogramSummary' in str(error):  # It draws only finite numbers.
        raise UserError(_not_a_number('a gradient is not finite')) from error
      raise
    return _how_it_ended(logger, stop, saver)


def _session(saver, hooks):
  """Starts a session, which restores the checkpoint that `checkpoint` names."""
  return tf.train.MonitoredTrainingSession(
      checkpoint_dir=FLAGS.train_dir,
      scaffold=tf.train.Scaffold(saver=saver),
      save_checkpoint_secs=FLAGS.save_checkpoint_secs,
      save_summaries_steps=FLAGS.save_summary_steps,
      log_step_count_steps=FLAGS.save_summary_steps,
      hooks=[tf.train.StopAtStepHook(last_step=FLAGS.max_steps)] + hooks,
      config=tf.ConfigProto(
          allow_soft_placement=True,
          log_device_placement=FLAGS.log_device_placement))


def _checkpoint_to_continue():
  """Returns the checkpoint in --train_dir to go on from, or None."""
  if FLAGS.overwrite:
    return None
  checkpoint = cifar10.latest_checkpoint(FLAGS.train_dir)
  if checkpoint is None and cifar10.checkpoints(FLAGS.train_dir):
    raise UserError('no checkpoint in --train_dir=%s is whole: --overwrite '
                    'starts anew.' % FLAGS.train_dir)
  return checkpoint


def _already_trained(checkpoint):
  """Says where training starts. Returns whether nothing is left to do."""
  if checkpoint is None:
    return False
  step = tf.train.load_variable(checkpoint, tf.GraphKeys.GLOBAL_STEP)
  if step < FLAGS.max_steps:
    print('Continuing from %s.' % checkpoint, flush=True)
    return False
  print('%s is trained for %d steps already: a larger --max_steps trains on, '
        '--overwrite starts anew.' % (checkpoint, step))
  return True


def _tidy(checkpoint):
  """Makes --train_dir ready, when all else has turned out well.

  What a killed save left is removed, and with --overwrite all that this suite
  writes, but nothing else. The file `checkpoint` names the one to restore.
  """
  if FLAGS.overwrite:
    _remove(r'checkpoint|run\.json|graph\.pbtxt|events\.out\.tfevents\..*|'
            r'model\.ckpt-\d+\.(index|meta|data-\d+-of-\d+)')
  _remove_remains()
  cifar10.write_run(FLAGS.train_dir)
  if checkpoint:
    paths = cifar10.checkpoints(FLAGS.train_dir)
    names = [os.path.basename(path)
             for path in paths[:paths.index(checkpoint) + 1]]
    # The session restores what this file says, and no other. (For a relative
    # folder, TensorFlow would make a relative path of a name.)
    tf.train.update_checkpoint_state(
        os.path.abspath(FLAGS.train_dir), names[-1], names[-FLAGS.max_to_keep:])


def _remove_remains():
  """Removes files of checkpoints that were never finished."""
  whole = map(os.path.basename, cifar10.checkpoints(FLAGS.train_dir))
  _remove(r'(checkpoint|graph\.pbtxt)\.tmp[0-9a-f]{32}|'
          r'model\.ckpt-\d+\.(index|meta|data-\d+-of-\d+)'
          r'\.(tempstate\d+|tmp[0-9a-f]{32})|'
          r'model\.ckpt-(?!(%s)\.)\d+\.(meta|data-\d+-of-\d+)'
          % '|'.join(name.split('-')[1] for name in whole))


def _remove(pattern):
  for name in os.listdir(FLAGS.train_dir):
    path = os.path.join(FLAGS.train_dir, name)
    if re.fullmatch(pattern, name) and os.path.isfile(path):
      os.remove(path)


class Saver(tf.train.Saver):
  """Saves no checkpoint of numbers that are none, and outlives a full disk.

  `failure` is why the last checkpoint could not be written, or None.
  """

  failure = None

  def __init__(self):
    # Relative paths, so that train_dir may be moved.
    super().__init__(
        max_to_keep=FLAGS.max_to_keep, save_relative_paths=True,
        keep_checkpoint_every_n_hours=FLAGS.keep_checkpoint_every_n_hours)
    self._are_finite = tf.reduce_all([
        tf.reduce_all(tf.is_finite(variable))
        for variable in tf.global_variables() if variable.dtype.is_floating])

  def save(self, sess, *arguments, **options):
    if not sess.run(self._are_finite):
      raise UserError(_not_a_number('a variable is not finite'))
    try:
      checkpoint = super().save(sess, *arguments, **options)
      self.failure = None
      return checkpoint
    except (OSError, ValueError, tf.errors.OpError) as error:
      # (A ValueError if the folder is gone.)
      self.failure = cifar10.what_went_wrong(error)
      say('A checkpoint could not be written: %s' % self.failure, sys.stderr)
      with contextlib.suppress(OSError):
        _remove_remains()


def _not_a_number(what):
  return ('%s. The last checkpoint in %s is older: start again to try from '
          'there; if it comes back, look at the data, or compute in float32.'
          % (what, FLAGS.train_dir))


class LoggerHook(tf.train.SessionRunHook):
  """Prints loss and speed every --log_frequency steps."""

  def __init__(self, loss, examples_per_step):
    self._loss = loss
    self._examples_per_step = examples_per_step

  def after_create_session(self, session, coord):
    self.step = session.run(tf.train.get_global_step())
    self._steps_since_line = 0
    self._start_time = time.time()

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(self._loss)

  def after_run(self, run_context, run_values):
    loss_value = run_values.results
    if not math.isfinite(loss_value):
      raise UserError(_not_a_number(
          'the loss is %s at step %d' % (loss_value, self.step)))
    self._steps_since_line += 1
    if self.step % FLAGS.log_frequency == 0:
      secs = (time.time() - self._start_time) / self._steps_since_line
      say('%s: step %d, loss = %.2f (%.1f examples/sec; %.3f sec/batch)' % (
          datetime.now(), self.step, loss_value,
          self._examples_per_step / secs, secs))
      self._start_time = time.time()
      self._steps_since_line = 0
    self.step += 1


class StopHook(tf.train.SessionRunHook):
  """Ends the session after the step in which something came up.

  `signum` is the signal that came, or None; `error` is what `check()`, called
  once a second, raised. `disk_was_full` does not end it: that may pass, but
  TensorFlow says nothing of the summaries that it loses meanwhile.
  """

  signum = error = None
  disk_was_full = False

  def __init__(self, check):
    self._check = check
    self._next_check = 0

  def begin(self):
    cifar10.handle_signals(lambda signum: setattr(self, 'signum', signum))

  def after_run(self, run_context, run_values):
    if time.time() >= self._next_check:
      self._next_check = time.time() + 1
      try:
        self._check()
      except UserError as error:
        self.error = error
      if not self.error and not self.disk_was_full and _is_disk_full():
        self.disk_was_full = True
        say('The disk of --train_dir=%s is full.' % FLAGS.train_dir, sys.stderr)
    if self.signum or self.error:
      run_context.request_stop()


def _is_disk_full():
  disk = os.statvfs(FLAGS.train_dir)
  free = disk.f_bfree if os.geteuid() == 0 else disk.f_bavail
  return disk.f_blocks > 0 and free == 0  # Some file systems count nothing.


def _how_it_ended(logger, stop, saver):
  """Returns the exit code, or raises what the user must know."""
  if stop.error:
    raise stop.error
  if saver.failure:
    raise UserError('the last checkpoint could not be written: %s. Those '
                    'before it are as they were; make room, and start again.'
                    % saver.failure)
  if stop.disk_was_full:
    raise UserError('the checkpoint of step %d is whole, but summaries may be '
                    'lost: the disk of --train_dir=%s was full.'
                    % (logger.step, FLAGS.train_dir))
  if stop.signum and logger.step < FLAGS.max_steps:
    say('Stopped by %s with a checkpoint: the same command continues.'
        % stop.signum.name)
    return 128 + stop.signum
  if logger.step < FLAGS.max_steps:
    raise UserError('the input ended at step %d: has a file of the data set '
                    'changed?' % logger.step)
  return 0


def main(argv=None):
  return train()


if __name__ == '__main__':
  cifar10.run(main)

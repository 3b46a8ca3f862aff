"""Train the CIFAR-10 network on one device.

    python cifar10_train.py         # CIFAR-10, 100,000 steps
    python cifar10_train.py --dataset=synthetic --train_dir=/tmp/synthetic_train

The second command needs no download; each data set needs its own --train_dir.

A run that ended, whatever ended it, continues from its last checkpoint in
--train_dir when it is started again. Ctrl-C and SIGTERM save one first.
While it trains, cifar10_eval.py tells how well the network does, and
`tensorboard --logdir=/tmp/cifar10_train` shows what goes on inside.
"""
from datetime import datetime
import math
import os
import re
import signal
import time

import cifar10
from cifar10_input import UserError, tf

FLAGS = tf.flags.FLAGS

cifar10.define_flags()
tf.flags.DEFINE_string(
    'train_dir', '/tmp/cifar10_train',
    'Where checkpoints and event files are written.')
tf.flags.DEFINE_boolean(
    'overwrite', False, 'Start anew: remove the checkpoints and event files of '
    'an earlier run in --train_dir.')
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
    'save_summary_steps', 100, 'Steps from one set of summaries to the next.',
    lower_bound=1)
tf.flags.DEFINE_integer(
    'seed', None, 'Draw the same initial weights in each run. (The order of '
    'the images depends on the threads that read them.)')
tf.flags.DEFINE_integer(
    'num_preprocess_threads', None, 'Threads that distort images; by default '
    'one for every four processors.', lower_bound=1)
tf.flags.DEFINE_boolean(
    'log_device_placement', False, 'Show which device each operation is on.')
tf.flags.adopt_module_key_flags(cifar10)


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
    images, labels = cifar10.distorted_inputs(
        dataset, num_threads=FLAGS.num_preprocess_threads)
  logits = cifar10.inference(images, len(dataset.classes))
  loss = cifar10.loss(logits, labels)
  return cifar10.train(loss, global_step, dataset), loss


def run_training(build, examples_per_step):
  """Trains until --max_steps, or until a signal comes.

  Args:
    build: function that builds a step, as `build_step` does.
    examples_per_step: images that one step learns from, over all towers.

  Returns:
    The exit code: 0, or 128 and the number of the signal.

  Raises:
    UserError: --train_dir cannot be used, or holds the checkpoint of another
      network; or the loss is not a number any more.
  """
  dataset = cifar10.prepare_dataset()
  checkpoint = _prepare_train_dir()
  if _already_trained(checkpoint):
    return 0
  stop = StopOnSignalHook()
  with tf.Graph().as_default():
    tf.set_random_seed(FLAGS.seed)
    train_op, loss = build(dataset, tf.train.get_or_create_global_step())
    if checkpoint:
      cifar10.check_checkpoint(
          checkpoint, {v.op.name: v for v in tf.global_variables()})
    if FLAGS.overwrite:  # Not before all else has turned out well.
      _remove_earlier_run()
    # Relative paths, so that train_dir may be moved.
    saver = tf.train.Saver(save_relative_paths=True)
    with tf.train.MonitoredTrainingSession(
        checkpoint_dir=FLAGS.train_dir,
        scaffold=tf.train.Scaffold(saver=saver),
        save_checkpoint_secs=FLAGS.save_checkpoint_secs,
        save_summaries_steps=FLAGS.save_summary_steps,
        log_step_count_steps=FLAGS.save_summary_steps,
        hooks=[tf.train.StopAtStepHook(last_step=FLAGS.max_steps),
               LoggerHook(loss, examples_per_step),
               stop],
        config=tf.ConfigProto(
            allow_soft_placement=True,
            log_device_placement=FLAGS.log_device_placement)) as session:
      while not session.should_stop():
        session.run(train_op)
  if stop.signum is None:
    return 0
  print('Stopped by %s with a checkpoint: the same command continues.'
        % stop.signum.name)
  return 128 + stop.signum


def _prepare_train_dir():
  """Makes --train_dir ready. Returns the checkpoint to go on from, or None."""
  try:
    os.makedirs(FLAGS.train_dir, exist_ok=True)
  except OSError as error:
    raise UserError('--train_dir=%s cannot be used: %s'
                    % (FLAGS.train_dir, error)) from error
  if not os.access(FLAGS.train_dir, os.W_OK):
    raise UserError('--train_dir=%s cannot be written to.' % FLAGS.train_dir)
  return (None if FLAGS.overwrite
          else tf.train.latest_checkpoint(FLAGS.train_dir))


def _remove_earlier_run():
  """Removes what this suite writes to --train_dir, and nothing else."""
  ours = re.compile(
      r'checkpoint|graph\.pbtxt|model\.ckpt-\d+\..*|events\.out\.tfevents\..*')
  try:
    for name in os.listdir(FLAGS.train_dir):
      if ours.fullmatch(name):
        os.remove(os.path.join(FLAGS.train_dir, name))
  except OSError as error:
    raise UserError('--overwrite: %s' % error) from error


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


class LoggerHook(tf.train.SessionRunHook):
  """Prints loss and speed every --log_frequency steps."""

  def __init__(self, loss, examples_per_step):
    self._loss = loss
    self._examples_per_step = examples_per_step

  def after_create_session(self, session, coord):
    self._step = session.run(tf.train.get_global_step())
    self._steps_since_line = 0
    self._start_time = time.time()

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(self._loss)

  def after_run(self, run_context, run_values):
    loss_value = run_values.results
    if not math.isfinite(loss_value):
      raise UserError(
          'the loss is %s at step %d. The last checkpoint in %s is older: '
          'start again to try from there.'
          % (loss_value, self._step, FLAGS.train_dir))
    self._steps_since_line += 1
    if self._step % FLAGS.log_frequency == 0:
      secs = (time.time() - self._start_time) / self._steps_since_line
      print('%s: step %d, loss = %.2f (%.1f examples/sec; %.3f sec/batch)' % (
          datetime.now(), self._step, loss_value,
          self._examples_per_step / secs, secs), flush=True)
      self._start_time = time.time()
      self._steps_since_line = 0
    self._step += 1


class StopOnSignalHook(tf.train.SessionRunHook):
  """Ends the session after the step in which Ctrl-C or SIGTERM came.

  A second one finds the system's own handler and ends the process at once.
  """

  signum = None

  def begin(self):
    for signum in (signal.SIGINT, signal.SIGTERM):
      signal.signal(signum, self._stop)

  def _stop(self, signum, frame):
    self.signum = signal.Signals(signum)
    signal.signal(signum, signal.SIG_DFL)

  def after_run(self, run_context, run_values):
    if self.signum is not None:
      run_context.request_stop()


def main(argv=None):
  return train()


if __name__ == '__main__':
  cifar10.run(main)

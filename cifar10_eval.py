"""Evaluate the CIFAR-10 network on the checkpoints of a training run.

    python cifar10_eval.py              # each new checkpoint, until Ctrl-C
    python cifar10_eval.py --run_once   # the latest one

Run it beside the training, or after it. A GPU that the training has taken
has no room for both: CUDA_VISIBLE_DEVICES= puts the evaluation on the CPU.
"""
from datetime import datetime

import numpy as np

import cifar10
from cifar10_input import UserError, tf

FLAGS = tf.flags.FLAGS

cifar10.define_flags()
tf.flags.DEFINE_string(
    'eval_dir', '/tmp/cifar10_eval', 'Where event files are written.')
tf.flags.DEFINE_enum(
    'eval_data', 'test', ['test', 'train_eval'],
    'Which examples to evaluate on: those kept for it, or those of training.')
tf.flags.DEFINE_string(
    'checkpoint_dir', '/tmp/cifar10_train', 'Where the checkpoints are.')
tf.flags.DEFINE_integer(
    'eval_interval_secs', 300,
    'Seconds from the start of one evaluation to that of the next, at least.',
    lower_bound=0)
tf.flags.DEFINE_integer(
    'eval_timeout_secs', 0, 'End when no new checkpoint came for so long after '
    '--eval_interval_secs; 0 waits for ever.', lower_bound=0)
tf.flags.DEFINE_integer(
    'num_examples', 10000, 'How many examples to evaluate on, or all if there '
    'are fewer.', lower_bound=1)
tf.flags.DEFINE_boolean(
    'run_once', False, 'Evaluate the latest checkpoint and end.')
tf.flags.adopt_module_key_flags(cifar10)


def evaluate():
  """Evaluates checkpoints as they come. Returns the exit code."""
  dataset = cifar10.prepare_dataset()
  with tf.Graph().as_default() as graph:
    with tf.device('/cpu:0'):
      images, labels = cifar10.inputs(FLAGS.eval_data == 'test', dataset)
    logits = cifar10.inference(images, len(dataset.classes))
    # The averages of the variables stand in for the variables.
    variables = tf.train.ExponentialMovingAverage(
        cifar10.MOVING_AVERAGE_DECAY).variables_to_restore()
    fetches = [tf.argmax(logits, axis=1), labels, tf.summary.merge_all()]
    scaffold = tf.train.Scaffold(saver=tf.train.Saver(variables))
    try:
      summary_writer = tf.summary.FileWriter(FLAGS.eval_dir, graph)
    except tf.errors.OpError as error:
      raise UserError('--eval_dir=%s cannot be used: %s'
                      % (FLAGS.eval_dir, error.message)) from error
    for checkpoint in _checkpoints():
      cifar10.check_checkpoint(checkpoint, variables)
      eval_once(checkpoint, scaffold, summary_writer, fetches, dataset.classes)
  return 0


def _checkpoints():
  """Yields the latest checkpoint, then each that follows unless --run_once."""
  folder = FLAGS.checkpoint_dir
  checkpoint = tf.train.latest_checkpoint(folder)
  if FLAGS.run_once:
    if checkpoint is None:
      raise UserError('no checkpoint in --checkpoint_dir=%s: cifar10_train.py '
                      'writes them.' % folder)
    yield checkpoint
    return
  if checkpoint is None:
    print('Waiting for a checkpoint in %s.' % folder, flush=True)
  for checkpoint in tf.train.checkpoints_iterator(
      folder, FLAGS.eval_interval_secs, FLAGS.eval_timeout_secs or None):
    yield checkpoint
  if checkpoint is None:
    raise UserError(
        'no checkpoint came to --checkpoint_dir=%s in --eval_timeout_secs=%d.'
        % (folder, FLAGS.eval_timeout_secs))


def eval_once(checkpoint, scaffold, summary_writer, fetches, classes):
  """Evaluates one checkpoint, prints the outcome and writes it for TensorBoard.

  Args:
    checkpoint: its path, without a suffix.
    scaffold: `tf.train.Scaffold`, whose saver restores the checkpoint.
    summary_writer: `tf.summary.FileWriter`.
    fetches: for a batch the predicted classes, int64 [batch or fewer], the true
      ones, int32 [batch or fewer], and the summaries.
    classes: names of the classes.

  Returns:
    Precision @ 1, from 0 to 1.
  """
  # Read first: a trainer may remove the checkpoint before we are through.
  step = tf.train.load_variable(checkpoint, tf.GraphKeys.GLOBAL_STEP)
  correct, total = np.zeros([2, len(classes)], np.int64)
  summary = None
  with tf.train.MonitoredSession(tf.train.ChiefSessionCreator(
      scaffold, checkpoint_filename_with_path=checkpoint)) as session:
    while not session.should_stop() and total.sum() < FLAGS.num_examples:
      if summary is None:  # One batch is enough for it.
        predicted, true, summary = session.run(fetches)
      else:
        predicted, true = session.run(fetches[:2])
      true = true[:FLAGS.num_examples - total.sum()]
      correct += np.bincount(
          true[predicted[:len(true)] == true], minlength=len(classes))
      total += np.bincount(true, minlength=len(classes))

  precision = correct.sum() / total.sum()
  print('%s: precision @ 1 = %.3f' % (datetime.now(), precision))
  print('%d/%d correct at step %d' % (correct.sum(), total.sum(), step))
  for row in zip(classes, correct / np.maximum(total, 1), correct, total):
    print('  %-16s %.3f (%d/%d)' % row, flush=True)
  summary = tf.Summary.FromString(summary)
  summary.value.add(tag='Precision @ 1', simple_value=precision)
  summary_writer.add_summary(summary, step)
  summary_writer.flush()
  return precision


def main(argv=None):
  return evaluate()


if __name__ == '__main__':
  cifar10.run(main)

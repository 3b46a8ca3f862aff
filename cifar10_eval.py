"""Evaluate the CIFAR-10 network on the checkpoints of a training run.

    python cifar10_eval.py              # each new checkpoint, until Ctrl-C
    python cifar10_eval.py --run_once   # the latest one

Run it beside the training, or after it. A GPU that the training has taken
has no room for both: CUDA_VISIBLE_DEVICES= puts the evaluation on the CPU.
"""
from datetime import datetime
import time

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
cifar10.refuse_patterns('checkpoint_dir')
tf.flags.DEFINE_integer(
    'eval_interval_secs', 300,
    'Seconds from the start of one evaluation to that of the next, at least.',
    lower_bound=0, upper_bound=10 ** 9)
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
  eval_data = FLAGS.eval_data == 'test'
  files = dataset.eval_files if eval_data else dataset.train_files
  num_examples = min(FLAGS.num_examples, sum(files.values()))
  with tf.Graph().as_default() as graph:
    with tf.device('/cpu:0'):
      images, labels = cifar10.inputs(eval_data, dataset)
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
      cifar10.check_files(dataset, files)  # They may have changed meanwhile.
      eval_once(checkpoint, scaffold, summary_writer, fetches, num_examples,
                dataset.classes)
  return 0


def _checkpoints():
  """Yields the latest checkpoint, then each that follows unless --run_once."""
  folder = FLAGS.checkpoint_dir
  listed, evaluated, since = None, None, time.time()
  if not FLAGS.run_once and not cifar10.checkpoints(folder):
    print('Waiting for a checkpoint in %s.' % folder, flush=True)
  while not FLAGS.run_once or listed is None:
    if listed != cifar10.checkpoints(folder):
      listed = cifar10.checkpoints(folder)
      checkpoint = cifar10.latest_checkpoint(folder)
      if checkpoint not in (None, evaluated):
        start = time.time()
        yield checkpoint
        evaluated = checkpoint
        if FLAGS.run_once:
          break
        time.sleep(max(0, start + FLAGS.eval_interval_secs - time.time()))
        since = time.time()
    elif 0 < FLAGS.eval_timeout_secs < time.time() - since:
      break
    else:
      time.sleep(1)
  if not evaluated:
    raise UserError(
        'no whole checkpoint in --checkpoint_dir=%s%s: cifar10_train.py writes '
        'them.' % (folder, '' if FLAGS.run_once else
                   ', nor in --eval_timeout_secs=%d' % FLAGS.eval_timeout_secs))


def eval_once(checkpoint, scaffold, summary_writer, fetches, num_examples,
              classes):
  """Evaluates one checkpoint, prints the outcome and writes it for TensorBoard.

  Args:
    checkpoint: its path, without a suffix.
    scaffold: `tf.train.Scaffold`, whose saver restores the checkpoint.
    summary_writer: `tf.summary.FileWriter`.
    fetches: for a batch the predicted classes, int64 [batch or fewer], the true
      ones, int32 [batch or fewer], and the summaries.
    num_examples: how many examples to count.
    classes: names of the classes.

  Returns:
    Precision @ 1, from 0 to 1.

  Raises:
    UserError: there were fewer examples.
  """
  # Read first: a trainer may remove the checkpoint before we are through.
  step = tf.train.load_variable(checkpoint, tf.GraphKeys.GLOBAL_STEP)
  correct, total = np.zeros([2, len(classes)], np.int64)
  summary = None
  with tf.train.MonitoredSession(tf.train.ChiefSessionCreator(
      scaffold, checkpoint_filename_with_path=checkpoint)) as session:
    while not session.should_stop() and total.sum() < num_examples:
      if summary is None:  # One batch is enough for it.
        predicted, true, summary = session.run(fetches)
      else:
        predicted, true = session.run(fetches[:2])
      true = true[:num_examples - total.sum()]
      correct += np.bincount(
          true[predicted[:len(true)] == true], minlength=len(classes))
      total += np.bincount(true, minlength=len(classes))

  if total.sum() < num_examples:
    raise UserError('only %d of %d examples could be read: has a file of the '
                    'data set changed?' % (total.sum(), num_examples))
  precision = correct.sum() / num_examples
  print('%s: precision @ 1 = %.3f' % (datetime.now(), precision))
  print('%d/%d correct at step %d' % (correct.sum(), num_examples, step))
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

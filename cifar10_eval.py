"""Evaluate the CIFAR-10 network on the checkpoints of a training run.

    python cifar10_eval.py              # each new checkpoint, until Ctrl-C
    python cifar10_eval.py --run_once   # the latest one
    python cifar10_eval.py --predict=cat.png dog.jpg    # what is on pictures
    python cifar10_eval.py --export_dir=/tmp/model      # a SavedModel, to serve

What data, network and precision a run has stands in its --checkpoint_dir, which
is all that need be said. Run it beside the training, or after it. A GPU that
the training has taken has no room for both: CUDA_VISIBLE_DEVICES= puts the
evaluation on the CPU.
"""
import csv
from datetime import datetime
import heapq
import math
import operator
import os
import sys
import time

import numpy as np

import cifar10
import cifar10_input
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
tf.flags.DEFINE_boolean(
    'use_moving_average', True, 'Evaluate the moving averages of the '
    'variables, not the variables themselves.')
tf.flags.DEFINE_boolean(
    'multiview', False, 'Average the probabilities over ten views of each '
    'picture, five crops and their mirror images, also in what is exported: '
    'better, at ten times the work.')
tf.flags.DEFINE_string(
    'predictions_csv', None, 'A file for the key, label and prediction of each '
    'example and the probability of each class.')
tf.flags.DEFINE_list(
    'predict', None, 'Say what is on these pictures instead: JPEG, PNG, GIF or '
    'BMP files of any size.')
tf.flags.DEFINE_string(
    'export_dir', None, 'Write the network as a SavedModel to this new folder '
    'instead, with all that it does to pictures.')

# How long the evaluator of a cluster waits for a chief that is not there.
_CHIEF_TIMEOUT_SECS = 120

NUM_MISTAKES = 10  # The surest ones, that TensorBoard shows.


def evaluate():
  """Evaluates checkpoints as they come. Returns the exit code."""
  graph = None
  for checkpoint in _checkpoints():
    if graph is None:  # Now that there is a run, it is known what of.
      dataset = _dataset()
      files = (dataset.eval_files if FLAGS.eval_data == 'test'
               else dataset.train_files)
      graph = tf.Graph()
      with graph.as_default():
        fetches = _build(dataset)
        variables = _variables()
        scaffold = tf.train.Scaffold(saver=tf.train.Saver(variables))
        writer = _summary_writer(graph)
    with graph.as_default():
      try:
        cifar10.check_checkpoint(checkpoint, variables)
        cifar10.check_files(dataset, files)  # They may have changed meanwhile.
        eval_once(checkpoint, scaffold, writer, fetches, files, dataset.classes)
      except tf.errors.NotFoundError:
        if checkpoint in cifar10.checkpoints(FLAGS.checkpoint_dir):
          raise
        print('%s was removed before its evaluation.' % checkpoint, flush=True)
  return 0


def _dataset():
  """Returns the data set that the run in --checkpoint_dir is of."""
  cifar10.adopt_run(FLAGS.checkpoint_dir)
  return cifar10.prepare_dataset()


def _build(dataset):
  """Returns images, labels, probabilities and summaries of a batch."""
  with tf.device('/cpu:0'):
    images, labels = cifar10.inputs(
        FLAGS.eval_data == 'test', dataset, _views())
    central = images[:tf.shape(labels)[0]]  # To show mistakes with.
  probabilities = _probabilities(images, dataset)
  return central, labels, probabilities, tf.summary.merge_all()


def _views():
  return (cifar10_input.TEN_VIEWS if FLAGS.multiview
          else cifar10_input.CENTRAL_VIEW)


def _probabilities(images, dataset):
  """Returns what the network says of images from `cifar10_input.views`."""
  classes = len(dataset.classes)
  probabilities = tf.nn.softmax(cifar10.inference(images, classes))
  return tf.reduce_mean(
      tf.reshape(probabilities, [len(_views()), -1, classes]), axis=0)


def _variables():
  """Returns the variables to restore, by their names in a checkpoint."""
  if FLAGS.use_moving_average:  # They stand in for the variables.
    return tf.train.ExponentialMovingAverage(
        cifar10.MOVING_AVERAGE_DECAY).variables_to_restore()
  return {v.op.name: v for v in tf.trainable_variables()}


def _add_images(summary, tag, images):
  """Adds images, 0 to 255, to a summary."""
  with tf.Graph().as_default(), tf.Session() as session:
    summary.MergeFromString(session.run(tf.raw_ops.ImageSummary(
        tag=tag, tensor=tf.constant(np.array(images, np.uint8)),
        max_images=1)))


def _summary_writer(graph):
  try:
    return tf.summary.FileWriter(FLAGS.eval_dir, graph)
  except tf.errors.OpError as error:
    raise UserError('--eval_dir=%s cannot be used: %s'
                    % (FLAGS.eval_dir, error.message)) from error


def _checkpoints():
  """Yields the latest checkpoint, then each that follows unless --run_once."""
  folder = FLAGS.checkpoint_dir
  chief = _chief()
  listed, evaluated, since = None, None, time.time()
  if not FLAGS.run_once and not cifar10.checkpoints(folder):
    print('Waiting for a checkpoint in %s.' % folder, flush=True)
  while not FLAGS.run_once or listed is None:
    found = cifar10.checkpoints(folder)
    if listed != found:
      listed = found
      checkpoint = cifar10.latest_checkpoint(folder)
      if checkpoint not in (None, evaluated):
        start = time.time()
        yield checkpoint
        evaluated = checkpoint
        if FLAGS.run_once or chief and _is_last(checkpoint):
          break
        while time.time() < start + FLAGS.eval_interval_secs and not (
            chief and any(map(_is_last, cifar10.checkpoints(folder)[-1:]))):
          time.sleep(min(1, FLAGS.eval_interval_secs))
        since = time.time()
    elif 0 < FLAGS.eval_timeout_secs < time.time() - since:
      break
    elif (chief and time.time() - since > _CHIEF_TIMEOUT_SECS
          and not cifar10.is_listening(chief)):
      raise UserError('the chief at %s has ended.' % chief)
    else:
      time.sleep(1)
  if not evaluated:
    raise _no_checkpoint()


def _chief():
  """Returns the address of the chief of a cluster, or None without one."""
  task = cifar10.cluster_task()
  if task is None:
    return None
  jobs, job, index = task
  if job != 'evaluator':
    raise UserError('TF_CONFIG says that this is %s %d: cifar10_eval.py is for '
                    'the evaluator.' % (job, index))
  return (jobs.get('chief') or jobs['master'])[0]


def _is_last(checkpoint):
  """Returns whether a checkpoint is of the step that its run is to end with."""
  max_steps = cifar10.read_run(FLAGS.checkpoint_dir).get('max_steps', math.inf)
  return int(checkpoint.rpartition('-')[2]) >= max_steps


def _no_checkpoint():
  waited = '' if FLAGS.run_once or FLAGS.predict or FLAGS.export_dir else (
      ', nor in --eval_timeout_secs=%d' % FLAGS.eval_timeout_secs)
  return UserError('no whole checkpoint in --checkpoint_dir=%s%s: '
                   'cifar10_train.py writes them.'
                   % (FLAGS.checkpoint_dir, waited))


def eval_once(checkpoint, scaffold, writer, fetches, files, classes):
  """Evaluates one checkpoint, prints the outcome and writes it for TensorBoard.

  Args:
    checkpoint: its path, without a suffix.
    scaffold: `tf.train.Scaffold`, whose saver restores the checkpoint.
    writer: `tf.summary.FileWriter`.
    fetches: images, labels, probabilities and summaries of a batch.
    files: number of examples in each file, in the order of reading.
    classes: names of the classes.

  Returns:
    Precision @ 1, from 0 to 1.

  Raises:
    UserError: there were fewer examples than the files should have.
  """
  # Read first: a trainer may remove the checkpoint before we are through.
  step = tf.train.load_variable(checkpoint, tf.GraphKeys.GLOBAL_STEP)
  num_examples = min(FLAGS.num_examples, sum(files.values()))
  outcome = Outcome(len(classes))
  with tf.train.MonitoredSession(tf.train.ChiefSessionCreator(
      scaffold, checkpoint_filename_with_path=checkpoint)) as session:
    for start in cifar10_input.progress(
        range(0, num_examples, FLAGS.batch_size), 'Evaluating batches'):
      if session.should_stop():
        break
      if start == 0:  # One batch is enough for the summaries.
        *batch, summary = session.run(fetches)
      else:
        batch = session.run(fetches[:3])
      outcome.add(*(values[:num_examples - start] for values in batch))
  if outcome.total < num_examples:
    raise UserError('only %d of %d examples could be read: has a file of the '
                    'data set changed?' % (outcome.total, num_examples))
  print('%s: precision @ 1 = %.3f' % (datetime.now(), outcome.precision))
  print('%d/%d correct at step %d' % (outcome.correct, outcome.total, step))
  outcome.print_classes(classes)
  if FLAGS.predictions_csv:
    outcome.write_csv(FLAGS.predictions_csv, files, classes)
  summary = tf.Summary.FromString(summary)
  summary.value.add(tag='Precision @ 1', simple_value=outcome.precision)
  outcome.add_pictures(summary, classes)
  writer.add_summary(summary, step)
  writer.flush()
  return outcome.precision


class Outcome:
  """What an evaluation has found so far.

  confusion: int64 [classes, classes], the number of examples by their true and
    their predicted class.
  """

  def __init__(self, num_classes):
    self.confusion = np.zeros([num_classes, num_classes], np.int64)
    self._answers = []
    self._mistakes = []  # The surest ones: probability, classes and image.

  def add(self, images, labels, probabilities):
    """Counts a batch: images, labels [n], probabilities [n, classes]."""
    predicted = probabilities.argmax(axis=1)
    np.add.at(self.confusion, (labels, predicted), 1)
    if FLAGS.predictions_csv:
      self._answers.extend(zip(labels, predicted, probabilities))
    wrong, = np.nonzero(predicted != labels)
    self._mistakes = heapq.nlargest(
        NUM_MISTAKES, self._mistakes + [
            (probabilities[i].max(), labels[i], predicted[i], images[i])
            for i in wrong], key=operator.itemgetter(0))

  @property
  def total(self):
    return self.confusion.sum()

  @property
  def correct(self):
    return self.confusion.trace()

  @property
  def precision(self):
    return self.correct / self.total

  def print_classes(self, classes):
    """Prints how many of each class were found, and how many finds hold."""
    width = max(map(len, classes))
    correct = self.confusion.diagonal()
    print('  %-*s  recall              precision' % (width, ''))
    for row in zip(classes, correct, self.confusion.sum(axis=1),
                   self.confusion.sum(axis=0)):
      name, right, true, predicted = row
      print('  %-*s  %.3f %-13s %.3f %s' % (
          width, name, right / max(true, 1), '(%d/%d)' % (right, true),
          right / max(predicted, 1), '(%d/%d)' % (right, predicted)))
    if len(classes) <= 20:
      print('  Row: true class; column: predicted class, in the same order.')
      for name, counts in zip(classes, self.confusion):
        print('  %-*s %s' % (width, name, ''.join('%6d' % n for n in counts)))
    sys.stdout.flush()

  def write_csv(self, path, files, classes):
    """Writes a line for each example: FILE:RECORD, classes, probabilities."""
    keys = ('%s:%d' % (name, i) for name, n in files.items() for i in range(n))
    with open(path, 'w', newline='') as f:
      writer = csv.writer(f)
      writer.writerow(['key', 'label', 'prediction'] + list(classes))
      for key, (label, prediction, probabilities) in zip(keys, self._answers):
        writer.writerow([key, classes[label], classes[prediction]]
                        + ['%.6f' % p for p in probabilities])

  def add_pictures(self, summary, classes):
    """Adds the confusion matrix and the surest mistakes to a summary."""
    shares = self.confusion / np.maximum(
        self.confusion.sum(axis=1, keepdims=True), 1)
    cell = np.pad(np.ones([15, 15]), [[0, 1], [0, 1]])
    picture = 255 * np.kron(shares ** 0.5, cell)  # So that a few are seen, too.
    _add_images(summary, 'confusion', [picture[..., np.newaxis]])
    for i, (_, true, predicted, image) in enumerate(self._mistakes):
      low, high = image.min(), image.max()
      _add_images(
          summary, 'surest_mistakes/%d_%s_taken_for_%s' % (
              i, classes[true], classes[predicted]),
          [255 * (image - low) / max(high - low, 1e-9)])


# Single pictures, and a model to serve.


def predict(paths):
  """Prints the likeliest classes of picture files. Returns the exit code."""
  checkpoint, dataset = _run()
  exit_code = 0
  with tf.Graph().as_default(), tf.Session() as session:
    contents = tf.placeholder(tf.string, [])
    planes = cifar10_input.decode(contents, dataset)
    probabilities = _probabilities(
        cifar10_input.views(planes, _views(), dataset), dataset)
    _restore(session, checkpoint)
    for path in paths:
      try:
        with open(path, 'rb') as f:
          values = session.run(probabilities, {contents: f.read()})[0]
      except (OSError, tf.errors.InvalidArgumentError) as error:
        print('%s: %s' % (path, getattr(
            error, 'strerror', 'is no JPEG, PNG, GIF or BMP file')),
              file=sys.stderr)
        exit_code = 1
        continue
      best = values.argsort()[::-1][:3]
      print('%s: %s' % (path, ', '.join(
          '%s %.3f' % (dataset.classes[i], values[i]) for i in best)),
            flush=True)
  return exit_code


def export(folder):
  """Writes a SavedModel. Returns the exit code.

  Its signature `serving_default` takes `images`, uint8 [batch, height, width,
  3]; `encoded` takes `encoded`, the strings [batch] of picture files. Both give
  `probabilities`, float32 [batch, classes], and `classes`, int64 [batch].
  """
  checkpoint, dataset = _run()
  if os.path.exists(folder):
    raise UserError('--export_dir=%s exists already: name a new one.' % folder)
  with tf.Graph().as_default(), tf.Session() as session:
    images = tf.placeholder(tf.uint8, [None, None, None, 3], 'images')
    encoded = tf.placeholder(tf.string, [None], 'encoded')
    with tf.variable_scope('', reuse=tf.AUTO_REUSE):
      signatures = {
          tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY: _signature(
              images, cifar10_input.fit(images, dataset), dataset),
          'encoded': _signature(encoded, tf.map_fn(
              lambda contents: cifar10_input.decode(contents, dataset)[0],
              encoded, fn_output_signature=tf.float32), dataset)}
    _restore(session, checkpoint)
    builder = tf.saved_model.Builder(folder)
    builder.add_meta_graph_and_variables(
        session, [tf.saved_model.tag_constants.SERVING], signatures)
    builder.save()
  print('%s is now %s.' % (checkpoint, folder))
  return 0


def _run():
  """Returns the latest checkpoint and the data set that its run is of."""
  checkpoint = cifar10.latest_checkpoint(FLAGS.checkpoint_dir)
  if checkpoint is None:
    raise _no_checkpoint()
  return checkpoint, _dataset()


def _signature(input_, planes, dataset):
  planes.set_shape([None, dataset.depth, dataset.height, dataset.width])
  probabilities = _probabilities(
      cifar10_input.views(planes, _views(), dataset), dataset)
  return tf.saved_model.predict_signature_def(
      {input_.op.name: input_},
      {'probabilities': probabilities,
       'classes': tf.argmax(probabilities, axis=1)})


def _restore(session, checkpoint):
  variables = _variables()
  cifar10.check_checkpoint(checkpoint, variables)
  tf.train.Saver(variables).restore(session, checkpoint)


def main(argv=None):
  if FLAGS.predict:
    return predict(FLAGS.predict + argv[1:])
  if argv[1:]:
    raise tf.flags.Error(
        'what is %r? Flags look like --name=value' % argv[1])
  return export(FLAGS.export_dir) if FLAGS.export_dir else evaluate()


if __name__ == '__main__':
  cifar10.run(main, takes_arguments=True)

"""Evaluate the CIFAR-10 network on the checkpoints of a training run.

    python cifar10_eval.py              # each new checkpoint, up to the last
    python cifar10_eval.py --run_once   # the latest one
    python cifar10_eval.py --predict=cat.png dog.jpg    # what is on pictures
    python cifar10_eval.py --export_dir=/tmp/model      # a SavedModel, to serve

Data, network and precision are those of the run in --checkpoint_dir. Run it
beside the training, or after it. If the training has taken all memory of a GPU,
CUDA_VISIBLE_DEVICES= puts the evaluation on the CPU.
"""
import csv
from datetime import datetime
import heapq
import io
import math
import operator
import os
import socket
import sys
import time

import cifar10_input  # First: Ctrl-C is without traceback, TensorFlow quiet.
import numpy as np
import PIL.Image
import PIL.ImageDraw
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_train
from cifar10_input import UserError, say, what_went_wrong

flags = tf.flags
FLAGS = flags.FLAGS

NUM_MISTAKES = 10  # The surest ones are shown in TensorBoard.


def evaluate():
  """Evaluates checkpoints as they come."""
  evaluation = None
  for checkpoint in _checkpoints():
    # Only now is there a run to take flags from; another may overwrite it.
    run = cifar10_train.read_run(FLAGS.checkpoint_dir)
    if evaluation is None or evaluation.run != run:
      evaluation = Evaluation()
    try:
      eval_once(checkpoint, evaluation)
      if FLAGS.run_once:
        break
    except (tf.errors.NotFoundError, ValueError):  # The latter by Saver.
      if checkpoint in cifar10_train.checkpoints(FLAGS.checkpoint_dir).values():
        raise
      say(f'{checkpoint} was removed before its evaluation.')


def _checkpoints():
  """Yields the latest checkpoint, then new ones up to that of the last step."""
  folder = FLAGS.checkpoint_dir
  if not FLAGS.run_once and not cifar10_train.checkpoints(folder):
    say(f'Waiting for a checkpoint in {folder}.')
  listed = evaluated = None
  next_time = -math.inf
  is_one = folder != cifar10_train.run_folder(folder)
  while True:
    steps = cifar10_train.checkpoints(folder)
    last_step = cifar10_train.read_run(folder).get('max_steps', math.inf)
    is_complete = (
        FLAGS.run_once or is_one or max(steps, default=0) >= last_step)
    if steps != listed and (is_complete or time.monotonic() >= next_time):
      listed = steps
      checkpoint = (_required_checkpoint() if is_complete
                    else cifar10_train.latest_checkpoint(folder))
      if checkpoint not in (None, evaluated):
        evaluated = checkpoint
        next_time = time.monotonic() + FLAGS.eval_interval_secs
        yield checkpoint
    elif is_complete:
      return
    else:
      time.sleep(1)


def _required_checkpoint():
  checkpoint = cifar10_train.latest_checkpoint(FLAGS.checkpoint_dir)
  if checkpoint is None:
    raise UserError(f'no whole checkpoint in --checkpoint_dir='
                    f'{FLAGS.checkpoint_dir}: cifar10_train.py writes them.')
  return checkpoint


class Evaluation:
  """The graph that evaluates the run in --checkpoint_dir.

  run: dict, what `cifar10_train.read_run` knows of it.
  graph: `tf.Graph`.
  dataset: `cifar10_input.Dataset`.
  files: dict, number of examples in each file, in the order of reading.
  fetches: images, labels, probabilities of a batch, and a summary.
  variables: dict of those to restore, by their names in a checkpoint.
  scaffold: `tf.train.Scaffold`, which restores them.
  """

  def __init__(self):
    self.run = cifar10_train.adopt_run(
        FLAGS.checkpoint_dir, ('dataset', 'data_dir', 'model', 'image_size'))
    self.dataset = cifar10_train.prepare_dataset()
    cifar10_train.check_classes(FLAGS.checkpoint_dir, self.dataset)
    self.files = (self.dataset.eval_files if FLAGS.eval_data == 'test'
                  else self.dataset.train_files)
    self.graph = tf.Graph()
    with self.graph.as_default():
      with tf.device('/cpu:0'):
        images, labels = cifar10.inputs(
            FLAGS.eval_data == 'test', self.dataset,
            image_size=FLAGS.image_size, views=_views())
      central = images[:FLAGS.batch_size]  # For pictures of mistakes.
      probabilities = _probabilities(images, self.dataset.classes)
      self.fetches = [central, labels, probabilities, tf.summary.merge_all()]
      self.variables = _variables()
      self.scaffold = tf.train.Scaffold(saver=tf.train.Saver(self.variables))
    # A `tf.summary.FileWriter` would not tell that a disk is full.
    eval_dir = FLAGS.eval_dir or os.path.join(
        cifar10_train.run_folder(FLAGS.checkpoint_dir),
        cifar10_train.EVAL_FOLDER)
    tf.io.gfile.makedirs(eval_dir)
    self._writer = tf.io.TFRecordWriter(os.path.join(
        eval_dir, 'events.out.tfevents.%.6f.%s.%d' % (
            time.time(), socket.gethostname(), os.getpid())))
    self.write_event(file_version='brain.Event:2')
    self.write_event(graph_def=self.graph.as_graph_def(
        add_shapes=True).SerializeToString())

  def write_event(self, **event):
    """Writes a `tf.Event` for TensorBoard."""
    self._writer.write(
        tf.Event(wall_time=time.time(), **event).SerializeToString())
    self._writer.flush()


def _adopt_classes():
  """Takes the network's flags from the run, and returns its classes."""
  run = cifar10_train.adopt_run(FLAGS.checkpoint_dir, ('model', 'image_size'))
  if run:
    return run['classes']
  # Without run.json, as in folders of the original, the data set tells.
  if FLAGS.dataset in cifar10_input.DATASETS:
    return cifar10_input.DATASETS[FLAGS.dataset].classes
  return cifar10_train.prepare_dataset().classes


def _views():
  return (cifar10_input.TEN_VIEWS if FLAGS.multiview
          else cifar10_input.CENTRAL_VIEW)


def _probabilities(images, classes):
  """Returns what the network says of images from `cifar10_input.crop_views`.

  It is averaged over the views of each picture: float32 [batch, classes].
  """
  logits = cifar10.inference(images, cifar10_train.network_recipe(classes))
  by_view = tf.reshape(
      tf.nn.softmax(logits), [len(_views()), -1, len(classes)])
  return tf.reduce_mean(by_view, axis=0)


def _variables():
  """Returns the variables to restore, by their names in a checkpoint."""
  if FLAGS.use_moving_average:  # The averages stand in for the variables.
    return tf.train.ExponentialMovingAverage(
        cifar10.MOVING_AVERAGE_DECAY).variables_to_restore()
  return {v.op.name: v for v in tf.trainable_variables()}


def eval_once(checkpoint, evaluation):
  """Evaluates one checkpoint, prints the outcome and writes it for TensorBoard.

  Args:
    checkpoint: its path, without a suffix.
    evaluation: the `Evaluation`.
  """
  dataset, files = evaluation.dataset, evaluation.files
  folder = cifar10.data_folder(dataset)
  cifar10_input.check_files(dataset, folder, files)
  cifar10_train.check_checkpoint(checkpoint, evaluation.variables)
  num_examples = min(FLAGS.num_examples, sum(files.values()))
  outcome = Outcome(len(dataset.classes), num_examples)
  try:
    with evaluation.graph.as_default(), tf.train.MonitoredSession(
        tf.train.ChiefSessionCreator(
            evaluation.scaffold,
            checkpoint_filename_with_path=checkpoint)) as session:
      *batch, summary = session.run(evaluation.fetches)
      outcome.add(*batch)
      progress = Progress(num_examples)  # The first batch tells no speed.
      progress.show(outcome.total)
      while outcome.total < num_examples:
        outcome.add(*session.run(evaluation.fetches[:3]))
        progress.show(outcome.total)
  finally:  # A file that has changed meanwhile explains any other error.
    cifar10_input.check_files(dataset, folder, files)
  step = cifar10_train.step_of(checkpoint)
  say(f'{datetime.now()}: precision @ 1 = {outcome.precision:.3f}')
  say(f'{outcome.correct}/{outcome.total} correct at step {step}')
  outcome.print_classes(dataset.classes)
  if FLAGS.predictions_csv:
    outcome.write_csv(FLAGS.predictions_csv, files, dataset.classes)
  summary = tf.Summary.FromString(summary)
  _add_outcome(summary, outcome, dataset.classes)
  evaluation.write_event(step=step, summary=summary)


def _add_outcome(summary, outcome, classes):
  """Adds an outcome to a `tf.Summary`, two numbers and two pictures."""
  # Training has these tags, too, so that each is one chart.
  summary.value.add(tag='Precision @ 1', simple_value=outcome.precision)
  summary.value.add(tag='cross_entropy', simple_value=outcome.cross_entropy)
  _add_image(summary, 'confusion', _draw_confusion(outcome.confusion, classes))
  _add_image(summary, 'surest_mistakes',
             _draw_mistakes(outcome.mistakes, classes))


class Progress:
  """Shows how far an evaluation is: a bar on a terminal, else a line at times.
  """
  _LINE_SECS = 30

  def __init__(self, num_examples):
    self._bar = None
    if cifar10_input.is_watched():
      self._bar = tf.keras.utils.Progbar(num_examples, unit_name='example')
    self._num_examples, self._last_line = num_examples, time.monotonic()

  def show(self, done):
    if self._bar:
      self._bar.update(done)
    elif time.monotonic() > self._last_line + self._LINE_SECS:
      self._last_line = time.monotonic()
      say('%d of %d examples.' % (done, self._num_examples))


class Outcome:
  """What an evaluation has found so far.

  confusion: int64 [classes, classes], the number of examples by their true and
    their predicted class.
  cross_entropy: float, the mean of -log of the true class's probability.
  mistakes: list of the surest ones: probability, both classes and image.
  """

  def __init__(self, num_classes, num_examples):
    self.confusion = np.zeros([num_classes, num_classes], np.int64)
    self.mistakes = []
    self._num_examples = num_examples
    self._answers = []
    self._cross_entropies = 0.0

  def add(self, *batch):
    """Counts a batch: images, labels [n], probabilities [n, classes]."""
    rest = self._num_examples - self.total  # The last batch may have more.
    images, labels, probabilities = (values[:rest] for values in batch)
    predicted = probabilities.argmax(axis=1)
    np.add.at(self.confusion, (labels, predicted), 1)
    self._answers.extend(zip(labels, predicted, probabilities))
    of_truth = probabilities[np.arange(len(labels)), labels]
    self._cross_entropies -= np.log(
        np.maximum(of_truth, np.finfo(np.float32).tiny)).sum()
    wrong, = np.nonzero(predicted != labels)
    self.mistakes = heapq.nlargest(
        NUM_MISTAKES, self.mistakes + [
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

  @property
  def cross_entropy(self):
    return self._cross_entropies / self.total

  def print_classes(self, classes):
    """Prints recall and precision of each class, and the confusion matrix."""
    width = max(map(len, classes))
    say('  %-*s  recall              precision' % (width, ''))
    for i, name in enumerate(classes):
      right = self.confusion[i, i]
      true, predicted = self.confusion[i].sum(), self.confusion[:, i].sum()
      say('  %-*s  %.3f %-13s %.3f %s' % (
          width, name, right / max(true, 1), '(%d/%d)' % (right, true),
          right / max(predicted, 1), '(%d/%d)' % (right, predicted)))
    if len(classes) <= 20:
      say('  Row: true class; column: predicted class, in the same order.')
      for name, counts in zip(classes, self.confusion):
        say('  %-*s %s' % (width, name, ''.join('%6d' % n for n in counts)))

  def write_csv(self, path, files, classes):
    """Writes a line for each example: FILE:RECORD, classes, probabilities."""
    keys = ('%s:%d' % (name, i) for name, n in files.items() for i in range(n))

    def write(f):
      writer = csv.writer(f)
      writer.writerow(['key', 'label', 'prediction', *classes])
      for key, (label, prediction, probabilities) in zip(keys, self._answers):
        writer.writerow([key, classes[label], classes[prediction],
                         *('%.6f' % p for p in probabilities)])

    cifar10_input.write_file(path, write)


def _add_image(summary, tag, image):
  """Adds a picture of Pillow's to a summary."""
  png = io.BytesIO()
  image.save(png, 'PNG')
  summary.value.add(tag=tag, image=tf.Summary.Image(
      width=image.width, height=image.height, colorspace=3,
      encoded_image_string=png.getvalue()))


def _draw_confusion(confusion, classes):
  """Draws a cell for each true (row) and predicted class, the darker the more.

  Up to 20 classes have their names beside them.
  """
  cell = 32 if len(classes) <= 20 else 6
  shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
  shades = 255 - np.uint8(255 * shares ** 0.5)  # The root shows small ones.
  side = cell * len(classes)
  matrix = PIL.Image.fromarray(shades).resize(
      [side, side], PIL.Image.Resampling.NEAREST)
  if len(classes) > 20:
    return matrix.convert('RGB')
  names = PIL.Image.new('RGB', [130, side], 'white')
  draw = PIL.ImageDraw.Draw(names)
  for i, name in enumerate(classes):
    draw.text([4, cell * i + 10], name[:20], 'black')
  picture = PIL.Image.new('RGB', [names.width + side] * 2, 'white')
  picture.paste(matrix, [names.width, names.width])
  picture.paste(names, [0, names.width])
  picture.paste(names.rotate(90, expand=True), [names.width, 0])
  return picture


def _draw_mistakes(mistakes, classes):
  """Draws images [height, width, depth], with what they were taken for."""
  width, height, side = 150, 170, 128
  picture = PIL.Image.new('RGB', [5 * width, 2 * height], 'white')
  draw = PIL.ImageDraw.Draw(picture)
  for i, (probability, true, predicted, image) in enumerate(mistakes):
    x, y = width * (i % 5), height * (i // 5)
    low, high = image.min(), image.max()
    shown = PIL.Image.fromarray(
        np.uint8(255 * (image - low) / max(high - low, 1e-9)))
    picture.paste(shown.resize([side, side]), [x, y])
    draw.text([x, y + side + 4], '%.22s\ntaken for %.14s %.3f' % (
        classes[true], classes[predicted], probability), 'black')
  return picture


# Single pictures, and a model to serve.


def predict(paths):
  """Prints the likeliest classes of pictures. Returns the exit code.

  The paths are those of picture files, or of folders with such files.
  """
  files = [file for path in paths for file in cifar10_input.files_at(path)]
  if not files:
    raise UserError(f'--predict={paths[0]} has no files.')
  checkpoint, classes = _required_checkpoint(), _adopt_classes()
  exit_code = 0
  with tf.Graph().as_default(), tf.Session() as session:
    planes = tf.placeholder(tf.uint8, [1, 3, 32, 32])
    probabilities = _classify(planes, classes)
    _restore(session, checkpoint)
    for path in files:
      try:
        picture = cifar10_input.read_picture(path)
      except Exception as error:  # Pillow has one for each kind of damage.
        exit_code = 1
        say(f'{path}: {what_went_wrong(error)}', sys.stderr)
        continue
      values = session.run(probabilities, {planes: [picture]})[0]
      best = values.argsort()[::-1][:3]
      say(f'{path}: ' + ', '.join(
          f'{classes[i]} {values[i]:.3f}' for i in best))
  return exit_code


def export(folder):
  """Writes a SavedModel.

  Its signature `serving_default` takes `images`, uint8 [batch, height, width,
  3]; `encoded` takes `encoded`, the strings [batch] of picture files. Both give
  `probabilities`, float32 [batch, classes], `classes`, int64 [batch], and their
  names, `labels`, strings [batch]. TensorFlow Lite converts the first one.
  """
  checkpoint, classes = _required_checkpoint(), _adopt_classes()
  if tf.io.gfile.exists(folder):
    raise UserError(f'--export_dir={folder} exists already: name a new one.')
  with tf.Graph().as_default(), tf.Session() as session:
    images = tf.placeholder(tf.uint8, [None, None, None, 3], 'images')
    encoded = tf.placeholder(tf.string, [None], 'encoded')
    decoded = tf.map_fn(
        lambda contents: cifar10_input.decode(contents)[0], encoded,
        fn_output_signature=tf.float32)
    with tf.variable_scope('', reuse=tf.AUTO_REUSE):
      signatures = {
          tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY: _signature(
              images, cifar10_input.fit(images), classes),
          'encoded': _signature(encoded, decoded, classes)}
    _restore(session, checkpoint)
    builder = tf.saved_model.Builder(folder)
    try:
      builder.add_meta_graph_and_variables(session, ['serve'], signatures)
      builder.save()
    except BaseException:  # Ctrl-C, too: half a model would be in the way.
      tf.io.gfile.rmtree(folder)
      raise
  say(f'Exported {checkpoint} to {folder}.')


def _classify(planes, classes):
  """Returns probabilities [batch, classes] for pictures [batch, 3, 32, 32]."""
  return _probabilities(
      cifar10_input.crop_views(planes, _views(), FLAGS.image_size), classes)


def _signature(input_, planes, classes):
  planes.set_shape([None, 3, 32, 32])
  probabilities = _classify(planes, classes)
  likeliest = tf.argmax(probabilities, axis=1)
  return tf.saved_model.predict_signature_def(
      {input_.op.name: input_},
      {'probabilities': probabilities, 'classes': likeliest,
       'labels': tf.gather(tf.constant(classes), likeliest)})


def _restore(session, checkpoint):
  variables = _variables()
  cifar10_train.check_checkpoint(checkpoint, variables)
  tf.train.Saver(variables).restore(session, checkpoint)


def define_flags():
  """Defines the flags of evaluation."""
  cifar10_train.define_data_flags()
  folder = cifar10_train.PathParser()
  flags.DEFINE(folder, 'checkpoint_dir', '/tmp/cifar10_train',
               'Where the checkpoints are, or one of them.')
  flags.DEFINE(folder, 'eval_dir', None, 'Where event files are written, if '
               'not in %s below the run.' % cifar10_train.EVAL_FOLDER)
  flags.DEFINE_enum(
      'eval_data', 'test', ['test', 'train_eval'],
      'Which examples to evaluate on: those kept for it, or those of training.')
  flags.DEFINE(
      cifar10_train.count_parser(), 'num_examples', 10000,
      'How many examples to evaluate on, or all if there are fewer.')
  flags.DEFINE_boolean(
      'run_once', False, 'Evaluate the latest checkpoint and end.')
  flags.DEFINE(
      cifar10_train.count_parser(0), 'eval_interval_secs', 300,
      'Seconds from the start of one evaluation to that of the next, at least.')
  flags.DEFINE_boolean('use_moving_average', True, 'Evaluate the moving '
                       'averages of the variables, not the variables.')
  flags.DEFINE_boolean(
      'multiview', False, 'Average over ten views of each picture, five crops '
      'and their mirror images: better, at ten times the work.')
  flags.DEFINE(
      folder, 'predictions_csv', None, 'A file, in a folder that exists, for '
      'the key, label, prediction and probabilities of each example.')
  flags.DEFINE_multi_string(
      'predict', None, 'Say what is on these pictures instead: of any size, '
      'that Pillow reads; or on those in a folder.')
  flags.DEFINE(
      folder, 'export_dir', None, 'Write the network as a SavedModel to this '
      'new folder instead, with all that it does to pictures.')


def main(argv=None):
  if FLAGS.predict:
    return predict(FLAGS.predict + argv[1:])
  if FLAGS.export_dir:
    return export(FLAGS.export_dir)
  if FLAGS.predictions_csv:
    cifar10_input.write_file(
        FLAGS.predictions_csv, lambda f: f.write('?'), is_trial=True)
  evaluate()


if __name__ == '__main__':
  cifar10_train.run_script(main, define_flags)

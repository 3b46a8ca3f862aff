"""Evaluate the CIFAR-10 network on the checkpoints of a training run.

    python cifar10_eval.py              # each new checkpoint, up to the last
    python cifar10_eval.py --run_once   # the latest one
    python cifar10_eval.py --predict=cat.png dog.jpg    # what is on pictures
    python cifar10_eval.py --export_dir=/tmp/model      # a SavedModel, to serve

Data set, network and number type are those of the run in --checkpoint_dir. Run
it during training, or afterwards.
"""
import csv
import dataclasses
from datetime import datetime
import io
import os
import time

import cifar10_input  # Before TensorFlow: it hides the start-up messages.
import numpy as np
import PIL.Image
import PIL.ImageDraw
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_train
from cifar10_input import UserError, say

FLAGS = tf.flags.FLAGS


def evaluate():
  """Evaluates the latest checkpoint, and new ones until the run has ended."""
  folder = cifar10_train.full_path(FLAGS.checkpoint_dir)
  if not FLAGS.run_once and not cifar10_train.checkpoints(folder):
    say(f'Waiting for a checkpoint in {folder}.')
  evaluation, listed, evaluated = None, -1, None
  next_time = 0.0
  while True:
    newest = max(cifar10_train.checkpoints(folder), default=-1)
    run = cifar10_train.read_run(folder)
    is_last = FLAGS.run_once or run and newest >= run.recipe.max_steps
    if is_last or newest != listed and time.monotonic() >= next_time:
      next_time = time.monotonic() + FLAGS.eval_interval_secs
      listed = newest
      checkpoint, run = latest(folder)  # The newest may be damaged.
      evaluation = evaluation or Evaluation(folder, run)
      if checkpoint != evaluated:
        evaluation.eval_once(checkpoint)
      evaluated = checkpoint
    if is_last:
      return
    time.sleep(1)


def latest(folder):
  """Returns a folder's latest checkpoint, and the `cifar10_train.Run`.

  The original scripts write no run.json: then the flags describe the run.
  """
  checkpoint = cifar10_train.latest_checkpoint(folder)
  if not checkpoint:
    raise UserError(f'--checkpoint_dir={folder} has no checkpoint.')
  run = cifar10_train.read_run(folder)
  if not run:
    classes = cifar10_input.find_dataset(FLAGS.dataset).classes
    run = cifar10_train.Run(
        FLAGS.dataset, FLAGS.data_dir, classes, dataclasses.replace(
            cifar10.original_recipe(), num_classes=len(classes)))
  given = {name: FLAGS[name].value for name in ('dataset', 'data_dir')
           if not FLAGS[name].using_default_value}
  if FLAGS.use_fp16:
    given['recipe'] = dataclasses.replace(run.recipe, dtype='float16')
  return checkpoint, dataclasses.replace(run, **given)


class Evaluation:
  """The graph that evaluates a run, and the writer of its summaries."""

  def __init__(self, folder, run):
    dataset = cifar10_input.find_dataset(run.dataset)
    if list(dataset.classes) != list(run.classes):
      raise UserError(f'{folder} was trained on other classes than those of '
                      f'--dataset={run.dataset}.')
    dataset = cifar10_input.prepare(dataset, run.data_dir, FLAGS.data_url)
    is_test = FLAGS.eval_data == 'test'
    self._classes = dataset.classes
    counts = cifar10_input.check_files(
        dataset, dataset.eval_files if is_test else dataset.train_files)
    keys = [f'{os.path.basename(path)}:{i}'
            for path, count in counts.items() for i in range(count)]
    self._keys = keys[:FLAGS.num_examples]  # All, if it is None.
    cifar10_train.say_where('Evaluating', run.recipe.dtype)
    self._graph = tf.Graph()
    with self._graph.as_default():
      with tf.device('/cpu:0'):
        images, labels = cifar10.inputs(
            is_test, dataset, image_size=run.recipe.image_size, views=_views())
      central = images[:FLAGS.batch_size]  # The first of the views.
      self._fetches = central, labels, _probabilities(images, run.recipe)
      self._summary = tf.summary.merge_all()
      self._restore = make_restorer()
    self._writer = tf.summary.FileWriter(cifar10_train.full_path(
        FLAGS.eval_dir or os.path.join(folder, 'eval')), self._graph)

  def eval_once(self, checkpoint):
    """Evaluates a checkpoint; prints, lists and summarizes the outcome."""
    outcome = Outcome(self._classes)
    csv_path = cifar10_train.full_path(FLAGS.predictions_csv or os.devnull)
    with tf.Session(graph=self._graph) as session, \
        tf.io.gfile.GFile(csv_path, 'w') as f:
      table = csv.writer(f)
      table.writerow(['key', 'label', 'prediction', *self._classes])
      self._restore(checkpoint, session)
      # It stops the threads of the queues; `join` raises what failed first.
      coord = tf.train.Coordinator()
      threads = tf.train.start_queue_runners(session, coord)
      with coord.stop_on_exception():
        for start in range(0, len(self._keys), FLAGS.batch_size):
          # The last batch may have more examples than are left to count.
          keys = self._keys[start:start + FLAGS.batch_size]
          images, labels, probabilities = (
              values[:len(keys)] for values in session.run(self._fetches))
          _check_finite(probabilities, checkpoint)
          outcome.add(images, labels, probabilities)
          for key, label, values in zip(keys, labels, probabilities):
            table.writerow([
                key, self._classes[label], self._classes[values.argmax()],
                *(f'{value:.6f}' for value in values)])
        summary = tf.Summary.FromString(session.run(self._summary))
        coord.request_stop()
      coord.join(threads)
    step = cifar10_train.step_of(checkpoint)
    outcome.print_out(step)
    outcome.summarize(summary)
    self._writer.add_summary(summary, step)
    self._writer.flush()


class Outcome:
  """What an evaluation has found so far.

  confusion: int64 [classes, classes], examples by true and predicted class.
  mistakes: the eight surest: probability, both classes and image of each.
  """

  def __init__(self, classes):
    self._classes = classes
    self.confusion = np.zeros([len(classes)] * 2, np.int64)
    self.mistakes = []
    self.total, self._cross_entropies = 0, 0.0

  def add(self, images, labels, probabilities):
    """Counts a batch: images, labels [n], probabilities [n, classes]."""
    self.total += len(labels)
    predicted = probabilities.argmax(axis=1)
    np.add.at(self.confusion, (labels, predicted), 1)
    of_truth = probabilities[np.arange(len(labels)), labels]
    self._cross_entropies -= np.log(
        np.maximum(of_truth, np.finfo(np.float32).tiny)).sum()
    self.mistakes += [
        (probabilities[i].max(), labels[i], predicted[i], images[i])
        for i in np.flatnonzero(predicted != labels)]
    self.mistakes.sort(key=lambda mistake: mistake[0], reverse=True)
    del self.mistakes[8:]

  def print_out(self, step):
    """Prints precision @ 1, and recall and precision of each class."""
    correct, width = self.confusion.trace(), max(map(len, self._classes))
    say(f'{datetime.now()}: precision @ 1 = {correct / self.total:.3f}')
    say(f'{correct}/{self.total} correct at step {step}')
    say(f'  {"":{width}}  recall              precision')
    for i, name in enumerate(self._classes):
      right = self.confusion[i, i]
      true, predicted = self.confusion[i].sum(), self.confusion[:, i].sum()
      say(f'  {name:{width}}  {right / max(true, 1):.3f} '
          f'{f"({right}/{true})":13} {right / max(predicted, 1):.3f} '
          f'({right}/{predicted})')

  def summarize(self, summary):
    """Adds two numbers and two pictures to a `tf.Summary`."""
    for tag, value in (  # Shared with training: one chart for both.
        ('Precision @ 1', self.confusion.trace() / self.total),
        ('cross_entropy', self._cross_entropies / self.total)):
      summary.value.add(tag=tag, simple_value=value)
    for tag, picture in (('confusion', self._draw_confusion()),
                         ('surest_mistakes', self._draw_mistakes())):
      png = io.BytesIO()
      picture.save(png, 'PNG')
      summary.value.add(tag=tag, image=tf.Summary.Image(
          width=picture.width, height=picture.height, colorspace=3,
          encoded_image_string=png.getvalue()))

  def _draw_confusion(self):
    """Draws the confusion matrix; darker cells have more examples."""
    # TensorBoard shows a picture some 350 pixels wide; texts must stay legible.
    cell, left, top = (40, 150, 64) if len(self._classes) <= 20 else (6, 0, 0)
    shares = self.confusion / self.confusion.sum(axis=1, keepdims=True).clip(1)
    shades = np.uint8(255 - 255 * shares ** 0.5)  # The root darkens small ones.
    side = cell * len(self._classes)
    picture = PIL.Image.new('RGB', [left + side, top + side], 'white')
    picture.paste(PIL.Image.fromarray(shades).resize(
        [side, side], PIL.Image.Resampling.NEAREST), [left, top])
    if left:
      _write(picture, [4, 0], 'Rows: true classes. Columns:\n'
             'predicted ones, in the same order.')
      for i, name in enumerate(self._classes):
        _write(picture, [4, top + cell * i + 4], name[:11])
    return picture

  def _draw_mistakes(self):
    """Draws each image with its true and its predicted class below."""
    side, height = 190, 280
    picture = PIL.Image.new('RGB', [4 * side, 2 * height], 'white')
    for i, (probability, true, predicted, image) in enumerate(self.mistakes):
      x, y = side * (i % 4), height * (i // 4)
      shown = np.uint8(255 * (image - image.min()) / np.ptp(image).clip(1e-9))
      picture.paste(PIL.Image.fromarray(shown).resize([side - 10] * 2), [x, y])
      _write(picture, [x, y + side - 8],
             f'{self._classes[true]:.13}\nnot {self._classes[predicted]:.10}\n'
             f'{probability:.3f}')
    return picture


def _write(picture, place, text):
  PIL.ImageDraw.Draw(picture).text(place, text, 'black', font_size=26)


def _views():
  return (cifar10_input.TEN_VIEWS if FLAGS.multiview
          else cifar10_input.CENTRAL_VIEW)


def _probabilities(images, recipe):
  """Returns float32 [batch, classes], averaged over each picture's views."""
  probabilities = tf.nn.softmax(cifar10.inference(images, recipe))
  by_view = tf.reshape(
      probabilities, [len(_views()), -1, recipe.num_classes])
  return tf.reduce_mean(by_view, axis=0)


def _check_finite(probabilities, checkpoint):
  if not np.isfinite(probabilities).all():
    raise UserError(f'{checkpoint}: probabilities are not finite.')


def make_restorer():
  """Returns a function that restores a checkpoint to a session."""
  variables = {v.op.name: v for v in tf.trainable_variables()}
  if FLAGS.use_moving_average:  # Load the averages instead.
    variables = tf.train.ExponentialMovingAverage(
        cifar10.MOVING_AVERAGE_DECAY).variables_to_restore()
  saver = tf.train.Saver(variables)
  return lambda checkpoint, session: cifar10_train.restore_checkpoint(
      checkpoint, saver, session, variables)


# Single pictures, and a model to serve.


def predict(paths):
  """Prints the three likeliest classes of each picture file."""
  checkpoint, run = latest(cifar10_train.full_path(FLAGS.checkpoint_dir))
  with tf.Graph().as_default(), tf.Session() as session:
    planes = tf.placeholder(  # Gets its value at each run.
        tf.uint8, [1, 3, cifar10_input.HEIGHT, cifar10_input.WIDTH])
    probabilities = _classify(planes, run.recipe)
    make_restorer()(checkpoint, session)
    for path in paths:
      picture = cifar10_input.read_picture(path)
      values = session.run(probabilities, {planes: [picture]})[0]
      _check_finite(values, checkpoint)
      best = values.argsort()[::-1][:3]
      say(f'{path}: ' + ', '.join(
          f'{run.classes[i]} {values[i]:.3f}' for i in best))


def export(folder):
  """Writes a SavedModel.

  Its signature `serving_default` takes `images`, uint8 [batch, 32, 32, 3], and
  TensorFlow Lite converts it; `encoded` takes strings [batch], JPEG or PNG
  files of any size. Both give `probabilities`, float32 [batch, classes],
  `classes`, int64 [batch], and their names, `labels`, strings [batch].
  """
  checkpoint, run = latest(cifar10_train.full_path(FLAGS.checkpoint_dir))
  if tf.io.gfile.exists(folder):
    raise UserError(f'--export_dir={folder} exists already: name a new one.')
  size = [cifar10_input.HEIGHT, cifar10_input.WIDTH]
  with tf.Graph().as_default(), tf.Session() as session:
    images = tf.placeholder(tf.uint8, [None, *size, 3], 'images')
    encoded = tf.placeholder(tf.string, [None], 'encoded')
    decoded = tf.map_fn(
        _decode, encoded, fn_output_signature=tf.TensorSpec([*size, 3]))
    signatures = {'serving_default': _signature(images, images, run)}
    with tf.variable_scope('', reuse=True):  # The same variables again.
      signatures['encoded'] = _signature(encoded, decoded, run)
    make_restorer()(checkpoint, session)
    if '://' not in folder:
      os.makedirs(folder)  # Fails if another export has just made it.
    builder = tf.saved_model.Builder(folder)
    builder.add_meta_graph_and_variables(session, ['serve'], signatures)
    builder.save()
  say(f'Exported {checkpoint} to {folder}.')


def _classify(planes, recipe):
  """Returns probabilities for pictures [batch, 3, height, width]."""
  return _probabilities(
      cifar10_input.crop_views(planes, _views(), recipe.image_size), recipe)


def _decode(contents):
  """Decodes a picture file, cuts out its middle square, and scales it."""
  is_readable = tf.logical_or(
      tf.io.is_jpeg(contents),
      tf.equal(tf.strings.substr(contents, 0, 4), b'\x89PNG'))
  # TensorFlow decodes some BMP and GIF files wrongly.
  with tf.control_dependencies([
      tf.Assert(is_readable, ['encoded takes JPEG and PNG files.'])]):
    image = tf.io.decode_png(contents, 3)  # And JPEG.
  side = tf.reduce_min(tf.shape(image)[:2])
  square = tf.image.resize_with_crop_or_pad(image, side, side)
  return tf.round(tf.compat.v2.image.resize(
      square, [cifar10_input.HEIGHT, cifar10_input.WIDTH], antialias=True))


def _signature(input_, images, run):
  """Returns a signature: the outputs for images [batch, height, width, 3]."""
  probabilities = _classify(tf.transpose(images, [0, 3, 1, 2]), run.recipe)
  likeliest = tf.argmax(probabilities, axis=1)
  return tf.saved_model.predict_signature_def(
      {input_.op.name: input_},
      {'probabilities': probabilities, 'classes': likeliest,
       'labels': tf.gather(tf.constant(run.classes), likeliest)})


def define_flags():
  """Defines the flags of evaluation."""
  cifar10_train.define_data_flags()
  if 'checkpoint_dir' in FLAGS:
    return
  tf.flags.adopt_module_key_flags(cifar10_train)  # So that --help shows them.
  tf.flags.DEFINE_string(
      'checkpoint_dir', '/tmp/cifar10_train', 'Folder of the run to evaluate.')
  tf.flags.DEFINE_string(
      'eval_dir', None, 'Folder of event files, if not eval/ below the run.')
  tf.flags.DEFINE_string('predictions_csv', None, 'File for key, label, '
                         'prediction and probabilities of each example.')
  tf.flags.DEFINE_string(
      'export_dir', None, 'Write a SavedModel to this new folder, and end.')
  tf.flags.DEFINE_multi_string(
      'predict', None, 'Print the classes of these picture files, and end.')
  tf.flags.DEFINE_enum('eval_data', 'test', ['test', 'train_eval'],
                       'Evaluate test examples, or those of training.')
  tf.flags.DEFINE_integer(
      'num_examples', None, 'Examples to evaluate, if not all.', lower_bound=1)
  tf.flags.DEFINE_integer(
      'eval_interval_secs', 300, 'Seconds between evaluations, at least.', 0)
  tf.flags.DEFINE_boolean(
      'run_once', False, 'Evaluate the latest checkpoint and end.')
  tf.flags.DEFINE_boolean('use_moving_average', True, 'Evaluate the moving '
                          'averages of the variables.')
  tf.flags.DEFINE_boolean('multiview', False, 'Average over ten views of each '
                          'picture: better, but ten times the work.')


def main(argv=None):
  pictures = cifar10_train.parse_flags(argv, define_flags)
  if FLAGS.predict:
    predict(FLAGS.predict + pictures)
  elif FLAGS.export_dir:
    export(cifar10_train.full_path(FLAGS.export_dir))
  else:
    evaluate()


if __name__ == '__main__':
  cifar10_train.run_script(main, define_flags)

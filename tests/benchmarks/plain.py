"""The plain formulation of the suite: the baseline of the benchmarks.

The mathematics of the tutorial in the operations that it names: one image at a
time is distorted in 16 threads, the shuffle queue holds float images, and
`tf.nn.lrn` normalizes. Nothing of it comes from the modules under test, so that
a fault of theirs cannot hide in both.
"""
import os

import cifar10_input  # Before TensorFlow: it hides the start-up messages.
import tensorflow.compat.v1 as tf


def build_step(data_dir, batch_size=128, dtype=tf.float32, batch=None):
  """Builds one step of training.

  Args:
    data_dir: folder with data_batch_1.bin to data_batch_5.bin.
    batch_size: images a batch.
    dtype: what the layers compute in.
    batch: images and labels to train on again and again, in place of the files.

  Returns:
    The operation that does the step, its loss, and its logits.
  """
  global_step = tf.train.get_or_create_global_step()
  with tf.device('/cpu:0'):
    images, labels = batch or distorted_inputs(data_dir, batch_size)
  logits = inference(images, dtype)
  loss = total_loss(logits, labels)
  return train(loss, global_step, batch_size), loss, logits


def read_image(data_dir):
  files = [os.path.join(data_dir, f'data_batch_{i}.bin') for i in range(1, 6)]
  filename_queue = tf.train.string_input_producer(files)
  _, value = tf.FixedLengthRecordReader(1 + 3 * 32 * 32).read(filename_queue)
  record = tf.decode_raw(value, tf.uint8)
  planes = tf.reshape(record[1:1 + 3 * 32 * 32], [3, 32, 32])
  label = tf.ensure_shape(tf.cast(record[:1], tf.int32), [1])
  return tf.cast(tf.transpose(planes, [1, 2, 0]), tf.float32), label


def distort(image):
  """Distorts one image, float32 [32, 32, 3]."""
  image = tf.random_crop(image, [24, 24, 3])
  image = tf.image.random_flip_left_right(image)
  image = tf.image.random_brightness(image, max_delta=63)
  image = tf.image.random_contrast(image, lower=0.2, upper=1.8)
  return tf.image.per_image_standardization(image)


def distorted_inputs(data_dir, batch_size):
  image, label = read_image(data_dir)
  min_queue_examples = 20000
  images, labels = tf.train.shuffle_batch(
      [distort(image), label], batch_size, num_threads=16,
      capacity=min_queue_examples + 3 * batch_size,
      min_after_dequeue=min_queue_examples)
  tf.summary.image('images', images)
  return images, tf.reshape(labels, [batch_size])


def inference(images, dtype):
  values = tf.cast(images, dtype)
  values = _convolution(values, 'conv1', 3, bias=0.0)
  values = _max_pool(values)
  values = _normalization(values)
  values = _convolution(values, 'conv2', 64, bias=0.1)
  values = _normalization(values)
  values = tf.reshape(_max_pool(values), [-1, 2304])
  values = tf.nn.relu(_affine(values, 'local3', 2304, 384, 0.04, 0.1, 0.004))
  _activation_summary('local3', values)
  values = tf.nn.relu(_affine(values, 'local4', 384, 192, 0.04, 0.1, 0.004))
  _activation_summary('local4', values)
  values = _affine(values, 'softmax_linear', 192, 10, 1 / 192.0, 0.0, None)
  _activation_summary('softmax_linear', values)
  return tf.cast(values, tf.float32)


def _convolution(values, name, channels, bias):
  kernel = _variable(name + '/weights', [5, 5, channels, 64], 0.05)
  biases = _variable(name + '/biases', [64], bias=bias)
  values = tf.nn.conv2d(
      values, tf.cast(kernel, values.dtype), strides=1, padding='SAME')
  values = tf.nn.relu(
      tf.nn.bias_add(values, tf.cast(biases, values.dtype)))
  _activation_summary(name, values)
  return values


def _max_pool(values):
  return tf.nn.max_pool(values, ksize=3, strides=2, padding='SAME')


def _normalization(values):
  return tf.cast(tf.nn.lrn(
      tf.cast(values, tf.float32), depth_radius=4, bias=1.0,
      alpha=0.001 / 9.0, beta=0.75), values.dtype)


def _affine(values, name, inputs, outputs, stddev, bias, decay):
  weights = _variable(name + '/weights', [inputs, outputs], stddev)
  biases = _variable(name + '/biases', [outputs], bias=bias)
  if decay:
    tf.add_to_collection('losses', decay * tf.nn.l2_loss(weights))
  return tf.nn.bias_add(
      tf.matmul(values, tf.cast(weights, values.dtype)),
      tf.cast(biases, values.dtype))


def _variable(name, shape, stddev=None, bias=None):
  initializer = (tf.constant_initializer(bias) if stddev is None
                 else tf.truncated_normal_initializer(stddev=stddev))
  with tf.device('/cpu:0'):
    return tf.get_variable(name, shape, tf.float32, initializer)


def _activation_summary(name, values):
  tf.summary.histogram(name + '/activations', values)
  tf.summary.scalar(name + '/sparsity', tf.nn.zero_fraction(values))


def total_loss(logits, labels):
  tf.add_to_collection('losses', tf.reduce_mean(
      tf.nn.sparse_softmax_cross_entropy_with_logits(
          labels=labels, logits=logits)))
  return tf.add_n(tf.get_collection('losses'))


def train(loss, global_step, batch_size):
  learning_rate = tf.train.exponential_decay(
      0.1, global_step, int(50000 / batch_size * 350), 0.1, staircase=True)
  tf.summary.scalar('learning_rate', learning_rate)
  losses = tf.get_collection('losses') + [loss]
  loss_averages = tf.train.ExponentialMovingAverage(0.9, name='avg')
  loss_averages_op = loss_averages.apply(losses)
  for i, each in enumerate(losses):
    tf.summary.scalar(f'loss_{i}', each)
    tf.summary.scalar(f'loss_{i}_average', loss_averages.average(each))
  with tf.control_dependencies([loss_averages_op]):
    optimizer = tf.train.GradientDescentOptimizer(learning_rate)
    gradients = optimizer.compute_gradients(loss)
  apply_gradient_op = optimizer.apply_gradients(gradients, global_step)
  for gradient, variable in gradients:
    tf.summary.histogram(variable.op.name, variable)
    tf.summary.histogram(variable.op.name + '/gradients', gradient)
  averages = tf.train.ExponentialMovingAverage(0.9999, global_step)
  with tf.control_dependencies([apply_gradient_op]):
    return averages.apply(tf.trainable_variables())

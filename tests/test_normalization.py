"""Promises of local response normalization, whose oracle is `tf.nn.lrn`."""
import numpy as np
import pytest

import cifar10
from cifar10_input import tf

# Of the largest magnitude: what float32 loses in two orders of summation.
TOLERANCE = 2e-6


def values_and_gradients(normalize, images, upstream, dtype=np.float32):
  with tf.Graph().as_default(), tf.Session() as session:
    x = tf.constant(images, dtype)
    y = normalize(x)
    dx, = tf.gradients(y, x, grad_ys=tf.constant(upstream, dtype))
    return session.run([tf.cast(y, tf.float32), tf.cast(dx, tf.float32)])


def ours_and_oracle(images, depth_radius, bias, alpha, dtype=np.float32):
  upstream = np.random.default_rng(2).normal(size=images.shape)
  ours = values_and_gradients(
      lambda x: cifar10.local_response_normalization(
          x, depth_radius, bias, alpha), images, upstream, dtype)
  oracle = values_and_gradients(
      lambda x: tf.nn.lrn(x, depth_radius, bias, alpha, beta=0.75),
      images, upstream)
  return zip(ours, oracle)


def assert_close(actual, expected, tolerance):
  np.testing.assert_allclose(
      actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize('depth_radius, channels', [
    (4, 64), (1, 64), (7, 33), (4, 3), (4, 1), (40, 16)])
@pytest.mark.parametrize('bias, alpha', [(1.0, 0.001 / 9.0), (2.0, 0.1)])
def test_values_and_gradients_are_those_of_tensorflow(
    depth_radius, channels, bias, alpha):
  images = 10 * np.random.default_rng(1).normal(size=(3, 5, 4, channels))
  for actual, expected in ours_and_oracle(images, depth_radius, bias, alpha):
    assert_close(actual, expected, TOLERANCE)


def test_zeros_stay_zeros_and_pass_the_gradient_on():
  images = np.zeros([2, 3, 3, 8])
  for actual, expected in ours_and_oracle(images, 4, 1.0, 0.001 / 9.0):
    np.testing.assert_array_equal(actual, expected)


def test_large_activations_are_normalized_as_exactly():
  images = 1e4 * np.random.default_rng(3).normal(size=(2, 4, 4, 64))
  for actual, expected in ours_and_oracle(images, 4, 1.0, 0.001 / 9.0):
    assert_close(actual, expected, TOLERANCE)


def test_bfloat16_is_rounded_only_on_the_way_in_and_out():
  images = 10 * np.random.default_rng(4).normal(size=(3, 5, 4, 64))
  dtype = tf.bfloat16.as_numpy_dtype
  images = images.astype(dtype).astype(np.float64)
  for actual, expected in ours_and_oracle(images, 4, 1.0, 0.001, dtype):
    # Half a unit in the last of 8 significant bits, of the largest number; the
    # gradient that comes in is rounded likewise.
    assert_close(actual, expected, 2 * 2.0 ** -8)

"""A reader's evaluation in the manner of TensorFlow 1's first years."""
import math
import sys

import tensorflow.compat.v1 as tf

import cifar10

FLAGS = tf.app.flags.FLAGS
tf.app.flags.DEFINE_string('checkpoint_dir', '/tmp/my_train', 'Of what.')
FLAGS(sys.argv)

images, labels = cifar10.inputs(eval_data=True)
batch = [tf.placeholder(tf.float32, [FLAGS.batch_size, 24, 24, 3]),
         tf.placeholder(tf.int32, [FLAGS.batch_size])]
top_k_op = tf.nn.in_top_k(cifar10.inference(batch[0]), batch[1], 1)
averages = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
saver = tf.train.Saver(averages.variables_to_restore())
with tf.Session() as sess:
  saver.restore(sess, tf.train.latest_checkpoint(FLAGS.checkpoint_dir))
  coord = tf.train.Coordinator()
  threads = tf.train.start_queue_runners(sess, coord)
  true_count = 0
  for _ in range(int(math.ceil(10000 / FLAGS.batch_size))):
    values = sess.run([images, labels])
    true_count += sess.run(top_k_op, dict(zip(batch, values))).sum()
  coord.request_stop()
  coord.join(threads, stop_grace_period_secs=10)
print('my count: %d' % true_count)

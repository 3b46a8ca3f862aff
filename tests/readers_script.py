"""A training script of a reader who knows the tutorial, and nothing else of us.

It stands on the functions that the tutorial explains. The suite must run it as
it is: do not adapt it to the suite.
"""
import os
import sys
import time

import tensorflow.compat.v1 as tf

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))
import cifar10

FLAGS = tf.app.flags.FLAGS

tf.app.flags.DEFINE_string('train_dir', '/tmp/my_train', 'Where to save.')
tf.app.flags.DEFINE_integer('max_steps', 1000, 'How long to train.')
tf.app.flags.DEFINE_boolean('log_device_placement', False, 'Tell devices.')


def train():
  with tf.Graph().as_default():
    global_step = tf.train.get_or_create_global_step()
    with tf.device('/cpu:0'):
      images, labels = cifar10.distorted_inputs()
    logits = cifar10.inference(images)
    loss = cifar10.loss(logits, labels)
    train_op = cifar10.train(loss, global_step)

    class Printer(tf.train.SessionRunHook):

      def begin(self):
        self.step = -1

      def before_run(self, run_context):
        self.step += 1
        self.start = time.time()
        return tf.train.SessionRunArgs(loss)

      def after_run(self, run_context, run_values):
        speed = FLAGS.batch_size / (time.time() - self.start)
        print('my step %d: loss %.2f, %.1f images a second'
              % (self.step, run_values.results, speed))

    with tf.train.MonitoredTrainingSession(
        checkpoint_dir=FLAGS.train_dir,
        hooks=[tf.train.StopAtStepHook(last_step=FLAGS.max_steps),
               tf.train.NanTensorHook(loss), Printer()],
        config=tf.ConfigProto(
            log_device_placement=FLAGS.log_device_placement)) as session:
      while not session.should_stop():
        session.run(train_op)


def main(argv=None):
  cifar10.maybe_download_and_extract()
  if tf.gfile.Exists(FLAGS.train_dir):
    tf.gfile.DeleteRecursively(FLAGS.train_dir)
  tf.gfile.MakeDirs(FLAGS.train_dir)
  train()


if __name__ == '__main__':
  tf.app.run()

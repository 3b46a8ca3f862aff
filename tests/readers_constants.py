"""A reader's script that trains and evaluates in one graph, in its own way."""
import sys

import tensorflow.compat.v1 as tf

import cifar10
import cifar10_input

cifar10_input.IMAGE_SIZE = 32
cifar10.NUM_CLASSES = 6
cifar10.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = 250
cifar10.INITIAL_LEARNING_RATE = 0.01
cifar10.NUM_EPOCHS_PER_DECAY = 0.4
cifar10.LEARNING_RATE_DECAY_FACTOR = 0.5
cifar10.MOVING_AVERAGE_DECAY = 0.0

for name in ('learning_rate', 'momentum', 'weight_decay', 'model', 'dataset',
             'seed', 'train_dir'):
  tf.app.flags.DEFINE_string(name, '7', 'A flag of mine.')
FLAGS = tf.app.flags.FLAGS
FLAGS(sys.argv)

images, labels = cifar10.distorted_inputs()
test_images, test_labels = cifar10.inputs(eval_data=True)
with tf.variable_scope(tf.get_variable_scope()) as scope:
  loss = cifar10.loss(cifar10.inference(images), labels)
  scope.reuse_variables()
  hits = tf.nn.in_top_k(cifar10.inference(test_images), test_labels, 1)
train_op = cifar10.train(loss, tf.train.get_or_create_global_step())
with tf.train.MonitoredTrainingSession(
    checkpoint_dir=FLAGS.train_dir, save_summaries_steps=1,
    hooks=[tf.train.StopAtStepHook(4)]) as sess:
  while not sess.should_stop():
    print('my counts:', sess.run(hits).sum(), sess.run(hits).sum())
    sess.run(train_op)

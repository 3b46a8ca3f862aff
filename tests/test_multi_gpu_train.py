"""cifar10_multi_gpu_train: towers learn as one device, and clusters end.

The tasks of a cluster are processes on this machine; what is killed is killed
for real.
"""
import json
import signal
import socket
import time

import numpy as np
import pytest

from conftest import (
    TINY, events, forgotten_flags, newest_step, parse_flags, printed_steps,
    run_queues, tf)

import cifar10
import cifar10_input
import cifar10_multi_gpu_train
import cifar10_train
from cifar10_input import CIFAR10, UserError

LAYERS = ('conv1', 'conv2', 'local3', 'local4', 'softmax_linear')


# Towers.


def variables():
  """Returns the variables of the network and their averages, by name."""
  return {v.op.name: v for v in tf.global_variables(
      '|'.join(LAYERS)) if not v.op.name.endswith('avg')}


def build(script, dataset, *flags):
  """Builds the step of a trainer. Returns it and its loss."""
  parse_flags(script, *flags)
  return script.build_step(dataset, cifar10_train.flags_recipe(dataset),
                           tf.train.get_or_create_global_step())


def test_two_towers_of_64_learn_as_one_batch_of_128(monkeypatch):
  random = np.random.default_rng(0)
  images = random.standard_normal((128, 24, 24, 3)).astype(np.float32)
  labels = random.integers(0, 10, 128, np.int32)
  monkeypatch.setattr(cifar10_train, 'training_batches', lambda *_: (
      tf.constant(images), tf.constant(labels)))
  values = []  # Before and after a step.
  for script, flags in (
      (cifar10_multi_gpu_train, ['--batch_size=64', '--num_gpus=2']),
      (cifar10_train, ['--batch_size=128'])):
    with tf.Graph().as_default(), forgotten_flags(), tf.Session() as session:
      train_op, _ = build(script, CIFAR10, *flags)
      assert {v.device for v in tf.trainable_variables()} == {'/device:CPU:0'}
      session.run(tf.global_variables_initializer())
      for name, value in values[0].items() if values else ():
        variables()[name].load(value, session)
      values.append(session.run(variables()))
      session.run(train_op)
      values.append(session.run(variables()))
  before, on_towers, _, on_one = values
  assert len(before) == len(on_towers) == len(on_one) == 20
  for name, expected in on_one.items():
    update = abs(expected - before[name]).max()
    assert update > 1e-5
    np.testing.assert_allclose(
        on_towers[name], expected, rtol=0, atol=min(1e-5, 0.01 * update))


def test_towers_have_different_images_and_one_mean_loss(
    tiny_flags, tiny_dir):
  dataset = cifar10_input.prepare(TINY, str(tiny_dir))
  _, loss = build(cifar10_multi_gpu_train, dataset, *tiny_flags, '--num_gpus=3')
  graph = tf.get_default_graph()
  assert not any(op.name.startswith('tower_3') for op in graph.get_operations())
  images = [graph.get_operation_by_name(f'tower_{i}/conv1/Conv2D').inputs[0]
            for i in range(3)]
  with run_queues() as session:
    loss, images, *losses = session.run(
        [loss, images] + [f'tower_{i}/total_loss:0' for i in range(3)])
  assert loss == pytest.approx(np.mean(losses), rel=1e-6)
  assert {len(each) for each in images} == {8}
  assert len({each.tobytes() for each in images}) == len(set(losses)) == 3


def test_variable_that_no_tower_uses_has_no_gradient():
  used, unused = tf.get_variable('used', [2]), tf.get_variable('unused', [2])
  towers = [[(tf.constant([1.0, i]), used), (None, unused)] for i in (2.0, 4.0)]
  (mean, first), (nothing, second) = (
      cifar10_multi_gpu_train.average_gradients(towers))
  assert (first, nothing, second) == (used, None, unused)
  with tf.Session() as session:
    assert session.run(mean).tolist() == [1, 3]


@pytest.fixture
def train_on_towers(call_script, tiny_flags, tmp_path):
  """Function that trains on two towers in tmp_path / 'run'."""
  return lambda *flags: call_script(
      cifar10_multi_gpu_train, *tiny_flags, '--log_frequency=1',
      f'--train_dir={tmp_path / "run"}', '--num_gpus=2', *flags)


def test_run_on_towers_continues_on_one_device_and_back(
    train, train_on_towers, tmp_path):
  run = train_on_towers('--max_steps=1', '--model=local', '--use_bfloat16')
  assert (run.code, printed_steps(run.stdout)) == (0, [0])
  assert 'The towers are on ' in run.stdout
  for trainer, steps in (train, 2), (train_on_towers, 3):
    run = trainer(f'--max_steps={steps}', '--model=local')
    assert (run.code, printed_steps(run.stdout)) == (0, [steps - 1])
  assert newest_step(tmp_path / 'run') == 3


def test_tensorboard_shows_the_same_of_towers_as_of_one_device(
    train_on_towers, trained, monkeypatch, tmp_path):
  # Epochs count the images of all towers: 250 / 16 * 0.2 steps.
  monkeypatch.setattr(cifar10, 'NUM_EPOCHS_PER_DECAY', 0.2)
  train_on_towers('--max_steps=5', '--save_summary_steps=1')
  found = events(tmp_path / 'run')
  rates = [value.simple_value for _, tag, value in found
           if tag == 'learning_rate']
  assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01])
  assert {tag for _, tag, _ in found} - {'global_step/sec'} == {
      tag for _, tag, _ in events(trained.train_dir)} - {'global_step/sec'}


# A cluster.


def config(jobs, job, index):
  return json.dumps(
      {'cluster': jobs, 'task': {'type': job, 'index': index}})


@pytest.mark.parametrize('text, complaint', [
    ('{"cluster": ', 'JSONDecodeError'),
    (config({'ps': ['d:4']}, 'ps', 0), 'chief'),
    (config({'chief': ['a:1'], 'ps': ['d:4']}, 'worker', 0), 'worker'),
    (config({'chief': ['a:1'], 'ps': ['d:4']}, 'ps', 1), 'IndexError'),
    (config({'chief': ['a:1'], 'ps': ['d:4']}, 'ps', 'x'), 'x')])
def test_wrong_tf_config_is_refused_in_one_line(monkeypatch, text, complaint):
  parse_flags(cifar10_multi_gpu_train)
  monkeypatch.setenv('TF_CONFIG', text)
  with pytest.raises(UserError, match=f'TF_CONFIG .*{complaint}'):
    cifar10_multi_gpu_train.read_cluster()


def test_tf_config_without_a_ps_trains_on_one_machine(
    train_on_towers, monkeypatch):
  monkeypatch.setenv('TF_CONFIG', config({'chief': ['a:1']}, 'chief', 0))
  assert train_on_towers('--max_steps=1').code == 0


class Cluster:
  """The processes of a chief, two workers and two ps."""

  def __init__(self, start_script, train_dir, data_dir):
    sockets = [socket.socket() for _ in range(5)]
    for each in sockets:
      each.bind(('127.0.0.1', 0))
    addresses = [f'127.0.0.1:{each.getsockname()[1]}' for each in sockets]
    for each in sockets:
      each.close()
    self.jobs = {'chief': addresses[:1], 'worker': addresses[1:3],
                 'ps': addresses[3:]}
    self.tasks, self._start_script = {}, start_script
    self._flags = ['--dataset=synthetic', f'--data_dir={data_dir}',
                   f'--train_dir={train_dir}', '--batch_size=8',
                   '--log_frequency=1']

  def start(self, *flags, worker_0_flags=(), jobs=('chief', 'worker', 'ps')):
    for job in jobs:
      for i in range(len(self.jobs[job])):
        more = worker_0_flags if (job, i) == ('worker', 0) else ()
        self.tasks[job, i] = self._start_script(
            'cifar10_multi_gpu_train', *self._flags, *flags, *more,
            TF_CONFIG=config(self.jobs, job, i))

  def steps(self, task=('chief', 0)):
    return printed_steps(self.tasks[task].stdout_path.read_text())

  def reach(self, step):
    for _ in range(900):
      if max(self.steps(), default=-1) >= step:
        return
      time.sleep(0.1)
    pytest.fail(self.tasks['chief', 0].stderr_path.read_text())

  def send(self, signum, *tasks):
    for task in tasks or self.tasks:
      self.tasks[task].send_signal(signum)

  def codes(self):
    """Waits for all tasks, and returns their exit codes."""
    return {task: process.wait(90) for task, process in self.tasks.items()}


@pytest.fixture
def cluster(start_script, synthetic_dir, tmp_path):
  return Cluster(start_script, tmp_path / 'run', synthetic_dir)


@pytest.mark.parametrize('flag, last_steps', [
    ('--sync_replicas', [12]),
    ('--nosync_replicas', [12, 13, 14])])  # Workers may do a last step at once.
def test_cluster_trains_and_all_tasks_end(
    cluster, tmp_path, flag, last_steps):
  cluster.start('--max_steps=12', flag)
  assert set(cluster.codes().values()) == {0}
  assert newest_step(tmp_path / 'run') in last_steps
  assert cluster.tasks['chief', 0].stderr_path.read_text() == ''
  assert cluster.steps(('worker', 0)) and cluster.steps(('worker', 1))


def test_sigterm_saves_and_a_lost_or_refused_task_costs_no_run(
    cluster, tmp_path):
  flags = '--max_steps=100000', '--save_checkpoint_secs=1'
  cluster.start(*flags)
  cluster.reach(5)
  cluster.send(signal.SIGKILL, ('ps', 1))  # A task that dies ends the run:
  cluster.send(signal.SIGTERM)             # stop the others.
  assert cluster.codes()['chief', 0] == 143
  before = newest_step(tmp_path / 'run')
  cluster.start(*flags, worker_0_flags=['--momentum=0.5'])
  refused = cluster.tasks['worker', 0]
  assert refused.wait(90) == 1
  line, = refused.stderr_path.read_text().splitlines()
  assert '--momentum' in line and '0.5' in line
  cluster.reach(before + 3)  # The others go on.
  cluster.send(signal.SIGTERM)
  codes = cluster.codes()
  assert codes['chief', 0] == codes['ps', 0] == codes['ps', 1] == 143
  assert newest_step(tmp_path / 'run') >= max(cluster.steps()) > before


def test_chief_that_waits_for_its_servers_ends_at_a_signal(cluster):
  cluster.start('--max_steps=12', jobs=('chief',))
  time.sleep(8)  # By then it asks for servers that are not there.
  cluster.send(signal.SIGTERM)
  assert cluster.codes()['chief', 0] in (143, -signal.SIGTERM)

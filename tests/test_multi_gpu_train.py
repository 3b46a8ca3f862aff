"""cifar10_multi_gpu_train: towers and machines learn as one, and end in time.

Arithmetic is compared in this process. The tasks of a cluster are processes of
their own on this machine, and what is killed is killed for real.
"""
import json
import re
import signal
import socket
import threading
import time

import numpy as np
import pytest

from conftest import (
    ROOT, TINY, events, forgotten_flags, newest_step, parse_flags,
    printed_steps, run_queues, tf)

import cifar10
import cifar10_multi_gpu_train
import cifar10_train
from cifar10_input import CIFAR10, UserError

LAYERS = ('conv1', 'conv2', 'local3', 'local4', 'softmax_linear')


def _variables():
  """Returns the variables of the network and their averages, by name."""
  return {v.op.name: v for v in tf.global_variables(
      '|'.join(LAYERS)) if not v.op.name.endswith('avg')}


def _build(script, dataset, *flags, **options):
  """Builds the step of a trainer. Returns it and its loss."""
  parse_flags(script, *flags)
  recipe = cifar10_train.training_recipe(dataset, 128)
  return script.build_step(
      dataset, recipe, tf.train.get_or_create_global_step(), **options)


def _assert_learned(before, after):
  """Asserts that variables are what one device makes of them."""
  with tf.Graph().as_default(), forgotten_flags(), tf.Session() as session:
    train_op, _ = _build(cifar10_train, CIFAR10)
    session.run(tf.global_variables_initializer())
    variables = _variables()
    for name, variable in variables.items():
      variable.load(before[name], session)
    session.run(train_op)
    expected = session.run(variables)
  assert len(before) == len(after) == len(expected) == 20
  for name, value in expected.items():
    update = abs(value - before[name]).max()
    assert update > 1e-5
    np.testing.assert_allclose(
        after[name], value, rtol=0, atol=min(1e-5, 0.01 * update))


@pytest.fixture
def constant_input(monkeypatch):
  """Makes 128 images the input, or a half of them in a thread of that name."""
  random = np.random.default_rng(0)
  images = random.standard_normal((128, 24, 24, 3)).astype(np.float32)
  labels = random.integers(0, 10, 128, np.int32)
  parts = {'first': slice(64), 'second': slice(64, None)}

  def training_batches(dataset, batch_size):
    part = parts.get(threading.current_thread().name, slice(None))
    return tf.constant(images[part]), tf.constant(labels[part])

  monkeypatch.setattr(cifar10_train, 'training_batches', training_batches)


# Towers.


def test_two_towers_of_64_learn_as_one_batch_of_128(constant_input):
  with forgotten_flags():
    train_op, _ = _build(cifar10_multi_gpu_train, CIFAR10, '--batch_size=64',
                         '--num_gpus=2')
  variables = _variables()
  assert {v.device for v in tf.trainable_variables()} == {'/device:CPU:0'}
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    before = session.run(variables)
    session.run(train_op)
    after = session.run(variables)
  _assert_learned(before, after)


def test_towers_have_images_of_their_own_and_one_mean_loss(tiny_flags):
  _, loss = _build(
      cifar10_multi_gpu_train, TINY, *tiny_flags, '--num_gpus=3')
  graph = tf.get_default_graph()
  names = {op.name for op in graph.get_operations()}
  assert not any(name.startswith('tower_3') for name in names)
  images = [graph.get_operation_by_name('tower_%d/conv1/Conv2D' % i).inputs[0]
            for i in range(3)]
  with run_queues() as session:
    loss, images, *losses = session.run(
        [loss, images] + ['tower_%d/total_loss:0' % i for i in range(3)])
  assert loss == pytest.approx(np.mean(losses), rel=1e-6)
  assert {len(each) for each in images} == {8}
  assert len({each.tobytes() for each in images}) == len(set(losses)) == 3


@pytest.fixture
def train_on_towers(call_script, tiny_flags, tmp_path):
  """Function that trains on two towers in tmp_path / 'run'."""
  return lambda *flags: call_script(
      cifar10_multi_gpu_train, *tiny_flags, '--log_frequency=1',
      '--train_dir=%s' % (tmp_path / 'run'), '--num_gpus=2', *flags)


def test_run_on_towers_goes_on_on_one_device_and_back(
    train, train_on_towers, caplog, tmp_path):
  run = train_on_towers('--max_steps=1', '--model=local', '--use_fp16')
  assert (run.code, printed_steps(run.stdout)) == (0, [0])
  for i in range(2):
    assert re.search(r'^tower_%d is on /[cg]pu:\d' % i, run.stdout, re.M)
  gpus = len(tf.config.list_physical_devices('GPU'))
  assert ('There are %d GPUs for --num_gpus=2' % gpus in run.stdout) == (
      gpus < 2)
  assert caplog.text.count('--use_fp16 is for GPUs') == (gpus == 0)
  for trainer, steps in (train, 2), (train_on_towers, 3):
    run = trainer('--max_steps=%d' % steps, '--model=local')
    assert (run.code, printed_steps(run.stdout)) == (0, [steps - 1])
  assert newest_step(tmp_path / 'run') == 3


def _top_level_names(train_dir):
  path, = train_dir.glob('events.out.*')
  graph = next(event.graph_def for event in tf.train.summary_iterator(str(path))
               if event.HasField('graph_def'))
  return {node.name.split('/')[0]
          for node in tf.GraphDef.FromString(graph).node}


def test_tensorboard_shows_of_towers_what_it_shows_of_one_device(
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
  on_one, on_towers = map(
      _top_level_names, (trained.train_dir, tmp_path / 'run'))
  assert len(on_one) <= 40 and len(on_towers) <= 40
  assert {'input', 'train', 'tower_0', 'tower_1'} <= on_towers


# What TF_CONFIG says of a cluster.


JOBS = {'chief': ['a:1'], 'worker': ['b:2', 'c:3'], 'ps': ['d:4']}


def _config(jobs=None, job='chief', index=0, **changes):
  return json.dumps({'cluster': {**(jobs or JOBS), **changes},
                     'task': {'type': job, 'index': index}})


@pytest.mark.parametrize('jobs, job, index', [
    (JOBS, 'chief', 0), (JOBS, 'worker', 1), (JOBS, 'ps', 0),
    ({'master': ['a:1'], 'ps': ['b:2']}, 'master', 0)])
def test_task_is_taken_from_the_environment(monkeypatch, jobs, job, index):
  monkeypatch.setenv('TF_CONFIG', _config(jobs, job, index, evaluator=['e:5']))
  assert cifar10_train.read_cluster() == (jobs, job, index)


@pytest.mark.parametrize('config, complaint', [
    ('{"cluster": {"ps": ["d:4"], "chief": 7}}', 'cannot be read: .*chief'),
    (_config(ps='d:4'), "cannot be read: .*'ps' must be a list"),
    (_config(index='x'), "cannot be read: .*'x'"),
    (_config(boss=['e:5']), 'none of chief, .*, evaluator: boss'),
    (_config(ps=['d']), 'an address that is not HOST:PORT: d'),
    (_config(ps=['d:99999']), 'an address that is not HOST:PORT: d:99999'),
    (_config(ps=['d:http']), 'an address that is not HOST:PORT: d:http'),
    (_config(ps=['d:4', 'b:2']), 'two tasks at b:2'),
    (_config(worker={'0': 'b:2', '2': 'c:3'}),
     r'gaps in the numbers of worker: \[0, 2\]'),
    (_config(master=['e:5']), '2 tasks chief or master, not one'),
    (_config(chief=[]), '0 tasks chief or master, not one'),
    (_config(ps=[]), 'has no ps in its cluster'),
    (_config(job='boss'), 'task type boss, .*: chief, worker, ps'),
    (json.dumps({'cluster': JOBS}), 'task type None'),
    (_config(job='worker', index=2), 'index 2, but .* only 2 of worker'),
    (_config(index=-1), 'task index -1')])
def test_wrong_configuration_is_refused_in_one_line(
    monkeypatch, config, complaint):
  monkeypatch.setenv('TF_CONFIG', config)
  with pytest.raises(UserError, match='TF_CONFIG .*' + complaint) as info:
    cifar10_multi_gpu_train.train()
  assert '\n' not in str(info.value)


# What a cluster does.


def _jobs(workers=1, servers=1):
  """Returns a chief and other tasks at free addresses of this machine."""
  sockets = [socket.socket() for _ in range(1 + workers + servers)]
  for each in sockets:
    each.bind(('127.0.0.1', 0))
  addresses = ['127.0.0.1:%d' % each.getsockname()[1] for each in sockets]
  for each in sockets:
    each.close()
  return {'chief': addresses[:1], 'worker': addresses[1:1 + workers],
          'ps': addresses[1 + workers:]}


def test_port_that_is_taken_is_named():
  parse_flags(cifar10_multi_gpu_train)
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    address = '127.0.0.1:%d' % taken.getsockname()[1]
    with pytest.raises(UserError, match='chief 0 at %s cannot' % address):
      cifar10_multi_gpu_train.Cluster(
          {'chief': [address], 'ps': ['b:2']}, 'chief', 0)


def _do_a_step(task, values):
  """Does one step of a cluster's task, and notes the variables around it."""
  with tf.Graph().as_default(), tf.device(task.device):
    train_op, _ = task.build_step(
        CIFAR10, cifar10_train.training_recipe(CIFAR10, 128),
        tf.train.get_or_create_global_step())
    creator = (tf.train.ChiefSessionCreator if task.is_chief
               else tf.train.WorkerSessionCreator)
    stop = tf.train.StopAtStepHook(last_step=1)
    with tf.train.MonitoredSession(
        creator(master=task.target, config=task.config),
        [*task.hooks, stop]) as session:
      def read(step_context):  # Outside of a step, so that none waits for it.
        values.append(step_context.session.run(_variables()))

      if task.is_chief:
        session.run_step_fn(read)
      session.run(train_op)
      if task.is_chief:
        session.run_step_fn(read)


def test_two_machines_with_64_images_learn_as_one_with_128(constant_input):
  jobs, values = _jobs(), []
  with forgotten_flags():
    parse_flags(cifar10_multi_gpu_train, '--batch_size=64')
    server, *tasks = (cifar10_multi_gpu_train.SyncCluster(jobs, job, 0)
                      for job in ('ps', 'chief', 'worker'))
    threads = [threading.Thread(name=name, target=_do_a_step, args=(
        task, values)) for name, task in zip(('first', 'second'), tasks)]
    for thread in threads:
      thread.start()
    threads[0].join(60)
    tasks[1].signals.append(signal.SIGTERM)  # It waits for the chief's end.
    threads[1].join(60)
  for task in (server, *tasks):
    task.status = {'end': None}  # Its threads end.
  _assert_learned(*values)


def test_task_that_never_comes_is_named(monkeypatch, capsys):
  parse_flags(cifar10_multi_gpu_train)
  monkeypatch.setattr(cifar10_multi_gpu_train, 'TIMEOUT_SECS', 9)
  jobs = _jobs()
  server, chief = (cifar10_multi_gpu_train.SyncCluster(jobs, job, 0)
                   for job in ('ps', 'chief'))
  for task in (server, chief):
    task.status = {'end': None}  # Their threads end.
  name = 'worker 0 at ' + jobs['worker'][0]
  for i in range(9):
    chief._take_in({0: {'time': i}})
  assert capsys.readouterr().out == 'Waiting for %s.\n' % name
  with pytest.raises(
      UserError, match='%s has not answered for 9 seconds.' % name):
    chief._take_in({0: {'time': 9}})


class Tasks:
  """The processes of a cluster, which train on a generated data set."""

  def __init__(self, start_script, train_dir, jobs, *flags):
    self.train_dir, self.processes, self.jobs = train_dir, {}, jobs
    self._start_script, self._flags = start_script, flags

  def start(self, *tasks, flags=(), script='cifar10_multi_gpu_train'):
    for task in tasks:
      job, index = task.split()
      self.processes[task] = self._start_script(
          script, '--train_dir=%s' % self.train_dir,
          '--dataset=synthetic', '--batch_size=8', '--log_frequency=1',
          '--save_checkpoint_secs=1', *self._flags, *flags,
          TF_CONFIG=_config(self.jobs, job, int(index)))

  def end(self, task, signum):
    """Ends a task by a signal. Returns its code."""
    self.processes[task].send_signal(signum)
    return self.processes[task].wait(60)

  def reach(self, step, task='chief 0'):
    for _ in range(600):
      path = self.processes[task].stdout_path
      steps = self.steps(task)
      if max(steps, default=-1) >= step:
        return
      time.sleep(0.1)
    pytest.fail('%s did %s: %s' % (task, steps, path.read_text()))

  def steps(self, task):
    """Returns the steps that a task has printed, each line with its name."""
    lines = self.processes[task].stdout_path.read_text().splitlines()
    assert all(line.startswith(task + ': ') for line in lines)
    return printed_steps('\n'.join(
        line.removeprefix(task + ': ') for line in lines))

  def last_error(self, task):
    """Returns the end of the last line on stderr, after names."""
    *_, line = self.processes[task].stderr_path.read_text().splitlines()
    start = '%s: cifar10_multi_gpu_train.py: ' % task
    assert line.startswith(start)  # TensorFlow may complain, too, before.
    return line.removeprefix(start)

  def codes(self, secs=120):
    """Returns the exit codes of all tasks, in the order in which they end."""
    codes, deadline = {}, time.time() + secs
    while len(codes) < len(self.processes) and time.time() < deadline:
      codes.update({task: process.returncode
                    for task, process in self.processes.items()
                    if task not in codes and process.poll() is not None})
      time.sleep(0.02)
    return codes


def test_cluster_outlives_worker_and_chief_and_ends_together(
    start_script, synthetic_dir, tmp_path):
  cluster = Tasks(start_script, tmp_path, _jobs(),
                  '--data_dir=%s' % synthetic_dir, '--max_steps=100')
  cluster.start('ps 0', 'chief 0')
  cluster.start('worker 0', flags=['--momentum=0.5'])
  assert cluster.processes['worker 0'].wait(60) == 1
  assert cluster.last_error('worker 0') == (
      '--momentum is 0.5 here, but 0.0 at chief 0 at %s: start all tasks with '
      'the same flags.' % cluster.jobs['chief'][0])
  assert not cluster.steps('chief 0')
  cluster.start('worker 0')
  cluster.reach(5, 'worker 0')
  cluster.end('worker 0', signal.SIGKILL)
  cluster.start('worker 0')
  cluster.reach(10, 'worker 0')
  assert cluster.end('chief 0', signal.SIGTERM) == 143
  assert 10 < newest_step(tmp_path) < 100
  cluster.start('chief 0')
  assert cluster.codes() == {'chief 0': 0, 'worker 0': 0, 'ps 0': 0}
  assert newest_step(tmp_path) == 100
  cluster.start('worker 0')  # Too late, but no failure.
  assert cluster.codes()['worker 0'] == 0


def test_asynchronous_cluster_needs_its_servers_and_stops_all_at_once(
    start_script, synthetic_dir, tmp_path):
  flags = ('--data_dir=%s' % synthetic_dir, '--max_steps=10000',
           '--nosync_replicas', '--use_bfloat16')
  cluster = Tasks(
      start_script, tmp_path, _jobs(workers=0, servers=2), *flags)
  cluster.start('ps 0', 'ps 1', 'chief 0')
  cluster.reach(5)
  cluster.end('ps 1', signal.SIGKILL)
  assert cluster.codes() == {'ps 1': -9, 'ps 0': 1, 'chief 0': 1}
  for task, start in ('chief 0', ''), ('ps 0', 'the chief: '):
    assert cluster.last_error(task) == (
        '%sps 1 at %s is gone, and the variables with it: start all tasks '
        'again.' % (start, cluster.jobs['ps'][1]))
  cluster = Tasks(start_script, tmp_path, _jobs(workers=0), *flags)
  cluster.start('ps 0', 'chief 0')
  cluster.reach(5)
  for process in cluster.processes.values():
    process.send_signal(signal.SIGTERM)
  assert list(cluster.codes(20).items()) == [('chief 0', 143), ('ps 0', 143)]
  assert newest_step(tmp_path) == cluster.steps('chief 0')[-1] + 1


_CHANGED = """
import sys
sys.path.insert(0, %r)
import cifar10_train
import cifar10_multi_gpu_train as script
%s
cifar10_train.run_script(script.main, script.define_flags)
"""


def _changed_script(folder, change):
  """Writes a script that differs from ours, and returns its path."""
  path = folder / 'cifar10_multi_gpu_train.py'
  path.write_text(_CHANGED % (str(ROOT), change))
  return str(path)


def test_server_that_listens_but_does_not_answer_is_named(
    start_script, synthetic_dir, tmp_path):
  path = _changed_script(tmp_path, 'script.TIMEOUT_SECS = 3')
  cluster = Tasks(start_script, tmp_path / 'run', _jobs(workers=0),
                  '--data_dir=%s' % synthetic_dir, '--nosync_replicas')
  host, port = cluster.jobs['ps'][0].split(':')
  with socket.socket() as mute:
    mute.bind((host, int(port)))
    mute.listen()
    cluster.start('chief 0', script=path)
    assert cluster.codes() == {'chief 0': 1}
  assert cluster.last_error('chief 0') == (
      'ps 0 at %s:%s has not answered for 3 seconds.' % (host, port))


def test_fault_of_our_own_ends_all_tasks(start_script, synthetic_dir, tmp_path):
  path = _changed_script(
      tmp_path, 'cifar10_train.LoggerHook._tell_time_left = None')
  cluster = Tasks(start_script, tmp_path / 'run', _jobs(workers=0),
                  '--data_dir=%s' % synthetic_dir)
  cluster.start('ps 0')
  cluster.start('chief 0', script=path)
  assert cluster.codes() == {'chief 0': 1, 'ps 0': 1}
  assert 'Traceback' in cluster.processes['chief 0'].stderr_path.read_text()
  for task, start in ('chief 0', ''), ('ps 0', 'the chief: '):
    assert cluster.last_error(task) == start + "'NoneType' object is not callable"


def test_of_a_synchronous_cluster_only_the_chief_ends_by_the_step():
  parse_flags(cifar10_multi_gpu_train, '--max_steps=5')
  jobs = _jobs()
  _, chief, worker = tasks = [
      cifar10_multi_gpu_train.SyncCluster(jobs, job, 0)
      for job in ('ps', 'chief', 'worker')]
  assert [chief.is_last(4), chief.is_last(5)] == [False, True]
  assert not worker.is_last(5)  # A new chief may repeat the step.
  for task in tasks:
    task.status = {'end': None}  # Its threads end.

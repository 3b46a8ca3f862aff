"""A cluster on this machine: it learns as one process does, and ends in time.

Each task is a process of its own, and what is killed is killed for real. Only
the arithmetic of two workers is compared inside one process.
"""
import json
import re
import signal
import socket
import threading
import time

import numpy as np
import pytest

import cifar10
import cifar10_eval
import cifar10_train
from cifar10_input import UserError, tf


def _addresses(count):
  """Returns free addresses on this machine."""
  sockets = [socket.socket() for _ in range(count)]
  for each in sockets:
    each.bind(('127.0.0.1', 0))
  addresses = ['127.0.0.1:%d' % each.getsockname()[1] for each in sockets]
  for each in sockets:
    each.close()
  return addresses


def _jobs(workers, servers=1):
  addresses = _addresses(1 + workers + servers)
  return {'chief': addresses[:1], 'worker': addresses[1:1 + workers],
          'ps': addresses[1 + workers:]}


JOBS = {'chief': ['a:1'], 'worker': ['b:2', 'c:3'], 'ps': ['d:4']}


def _config(jobs=None, job='chief', index=0, **changes):
  return json.dumps({'cluster': {**(jobs or JOBS), **changes},
                     'task': {'type': job, 'index': index}})


# What TF_CONFIG says.


@pytest.mark.parametrize('config', ['', '{}', '{"task": {"type": "worker"}}',
                                    '{"cluster": {}}'])
def test_without_a_cluster_nothing_listens(monkeypatch, config):
  monkeypatch.setenv('TF_CONFIG', config)
  assert cifar10.cluster_task() is None


@pytest.mark.parametrize('job, index', [
    ('chief', 0), ('worker', 1), ('ps', 0), ('evaluator', 0)])
def test_task_is_taken_from_the_environment(monkeypatch, job, index):
  monkeypatch.setenv('TF_CONFIG', _config(job=job, index=index))
  assert cifar10.cluster_task() == (JOBS, job, index)


def test_older_clusters_call_their_chief_master(monkeypatch):
  jobs = {'master': ['a:1'], 'ps': ['b:2']}
  monkeypatch.setenv('TF_CONFIG', _config(jobs, 'master'))
  assert cifar10.cluster_task() == (jobs, 'master', 0)


@pytest.mark.parametrize('config, complaint', [
    ('{oops', 'cannot be read: Expecting property name'),
    ('[1]', 'cannot be read: it is no object in JSON'),
    ('{"cluster": [1]}', 'cannot be read: .*cluster'),
    (_config(ps='d:4'), "cannot be read: .*'ps' must be a list"),
    (_config(index='x'), "cannot be read: .*'x'"),
    (_config(boss=['e:5']), 'none of chief, .*, evaluator: boss'),
    (_config(ps=['d']), 'an address that is not HOST:PORT: d'),
    (_config(ps=['d:99999']), 'an address that is not HOST:PORT: d:99999'),
    (_config(master=['e:5']), '2 tasks chief or master, not one'),
    (_config(chief=[]), '0 tasks chief or master, not one'),
    (_config(ps=[]), 'has no ps in its cluster'),
    (_config(job='boss'), 'task type boss, .*: chief, worker, ps'),
    (json.dumps({'cluster': JOBS}), 'task type None'),
    (_config(job='worker', index=2), 'index 2, but .* only 2 of worker'),
    (_config(index=-1), 'task index -1'),
])
def test_wrong_configuration_is_refused_in_one_line(
    monkeypatch, config, complaint):
  monkeypatch.setenv('TF_CONFIG', config)
  with pytest.raises(UserError, match=r'TF_CONFIG .*%s' % complaint) as info:
    cifar10.cluster_task()
  assert '\n' not in str(info.value)


def test_each_script_refuses_the_tasks_of_the_other(monkeypatch):
  monkeypatch.setenv('TF_CONFIG', _config(job='evaluator'))
  with pytest.raises(UserError, match=r'evaluator.* cifar10_eval\.py'):
    cifar10_train.main()
  monkeypatch.setenv('TF_CONFIG', _config(job='ps'))
  with pytest.raises(UserError, match='ps 0: .* for the evaluator'):
    cifar10_eval.main([''])


def test_port_that_is_taken_is_named():
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    address = '127.0.0.1:%d' % taken.getsockname()[1]
    with pytest.raises(UserError, match='chief 0 at %s cannot' % address):
      cifar10_train.Cluster({'chief': [address], 'ps': ['b:2']}, 'chief', 0)


def test_backup_workers_leave_somebody_to_wait_for(set_flags):
  set_flags(backup_workers=3)
  with pytest.raises(UserError, match='--backup_workers=3 is all of the 3'):
    cifar10_train.Cluster(JOBS, 'chief', 0)


# What it computes.


def _build(images, labels, replicas=cifar10.ALONE):
  """Returns a step of training on a batch that is given."""
  loss = cifar10.loss(cifar10.inference(tf.constant(images)), labels)
  return cifar10.train(
      loss, tf.train.get_or_create_global_step(), replicas=replicas)



def _run_worker(place, images, labels, values):
  """Does one step of a worker, and notes variables before and after it."""
  with tf.Graph().as_default(), tf.device(place.device):
    step = _build(images, labels, place.replicas)
    place.wait()
    with tf.train.MonitoredTrainingSession(
        place.target, place.is_chief, hooks=place.hooks,
        config=tf.ConfigProto(device_filters=place.device_filters)) as session:
      if place.is_chief:
        values.append(session.run(tf.trainable_variables()))
      session.run(step)
      values.append(session.run(tf.trainable_variables()))


def test_two_synchronous_workers_learn_as_one_with_both_their_batches(
    set_flags):
  set_flags(batch_size=64, learning_rate=1.0)
  random = np.random.default_rng(1)
  images = random.standard_normal((128, 24, 24, 3)).astype(np.float32)
  labels = random.integers(10, size=128).astype(np.int32)
  jobs = _jobs(workers=1)
  server = cifar10_train.Cluster(jobs, 'ps', 0)
  values = {'chief': [], 'worker': []}
  threads = [
      threading.Thread(target=_run_worker, args=(
          cifar10_train.Cluster(jobs, job, 0), images[part], labels[part],
          values[job]))
      for job, part in (('chief', slice(64)), ('worker', slice(64, None)))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert server.target
  before, after = values['chief']

  set_flags(batch_size=128)
  step = _build(images, labels)
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    for variable, value in zip(tf.trainable_variables(), before):
      variable.load(value, session)
    session.run(step)
    alone = session.run(tf.trainable_variables())
  for start, together, expected in zip(before, after, alone):
    assert abs(expected - start).max() > 1e-4
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-5)


def test_variables_are_spread_by_size():
  place = cifar10_train._by_size(2)
  with tf.Graph().as_default(), tf.device(tf.train.replica_device_setter(
      cluster=tf.train.ClusterSpec(
          {'ps': ['a:1', 'b:2'], 'worker': ['c:3']}), ps_strategy=place)):
    cifar10.inference(tf.zeros([8, 24, 24, 3]))
    bytes_on = {0: 0, 1: 0}
    largest = 0
    for variable in tf.trainable_variables():
      size = 4 * variable.shape.num_elements()
      largest = max(largest, size)
      bytes_on[tf.DeviceSpec.from_string(variable.device).task] += size
  assert max(bytes_on.values()) < 1.01 * largest


# What its tasks do.


class Tasks:
  """The processes of a cluster, which train on a small generated data set."""

  def __init__(self, start, jobs, train_dir, *flags):
    self.train_dir = train_dir
    self.processes = {}
    self._start, self._jobs = start, jobs
    self._flags = ['--dataset=synthetic', '--batch_size=8', *flags]

  def start(self, job, index=0, script='cifar10_train', folder='train_dir'):
    self.processes[job, index] = process = self._start(
        script, '--%s=%s' % (folder, self.train_dir), *self._flags,
        TF_CONFIG=_config(self._jobs, job, index))
    return process

  def start_all(self):
    for job, addresses in self._jobs.items():
      for index in range(len(addresses)):
        self.start(job, index)

  def step(self, job='chief', index=0):
    """Returns the latest step that a task has printed, or -1."""
    lines = self.processes[job, index].stdout_path.read_text()
    return max(map(int, re.findall(r'step (\d+), loss', lines)), default=-1)

  def reach(self, step, job='chief', index=0):
    for _ in range(600):
      if self.step(job, index) >= step:
        return
      time.sleep(0.1)
    pytest.fail('%s %d is at step %d' % (job, index, self.step(job, index)))

  def codes(self, secs):
    """Returns the exit codes of all tasks, which have so long to end."""
    deadline = time.time() + secs
    return {task: process.wait(max(0.1, deadline - time.time()))
            for task, process in self.processes.items()}


@pytest.fixture
def tasks(start_script, synthetic_dir, tmp_path):
  """Function that makes a cluster of a ps, a chief and workers."""
  return lambda workers, *flags: Tasks(
      start_script, _jobs(workers), tmp_path / 'train',
      '--data_dir=%s' % synthetic_dir, '--log_frequency=1',
      '--save_checkpoint_secs=1', *flags)


def _saved_step(folder):
  return tf.train.load_variable(
      cifar10.latest_checkpoint(str(folder)), 'global_step')


def test_worker_that_is_killed_comes_back_and_all_end_together(
    tasks, finish, synthetic_dir, tmp_path):
  cluster = tasks(1, '--max_steps=60')
  cluster.start_all()
  cluster.reach(10, 'worker')
  cluster.processes['worker', 0].kill()
  cluster.reach(10)
  cluster.start('worker')
  evaluator = Tasks(
      cluster._start, cluster._jobs, tmp_path / 'train',
      '--data_dir=%s' % synthetic_dir, '--eval_dir=%s' % (tmp_path / 'eval'),
      '--eval_interval_secs=1').start(
          'evaluator', script='cifar10_eval', folder='checkpoint_dir')
  cluster.reach(59)
  assert set(cluster.codes(10).values()) == {0}
  assert _saved_step(tmp_path / 'train') == 60
  run = finish(evaluator)
  assert run.code == 0 and run.stdout.count('correct at step 60') == 1
  late = finish(cluster.start('worker'))
  assert late.code == 0 and 'is trained for 60 steps already' in late.stdout


def test_cluster_outlives_its_chief_but_not_its_parameter_server(
    tasks, tmp_path):
  cluster = tasks(1, '--max_steps=50')
  cluster.start_all()
  cluster.reach(10)
  chief = cluster.processes['chief', 0]
  chief.send_signal(signal.SIGTERM)
  assert chief.wait(20) == 143
  assert 'Stopped by SIGTERM with a checkpoint' in chief.stdout_path.read_text()
  saved = _saved_step(tmp_path / 'train')
  assert saved >= 10

  chief = cluster.start('chief')
  cluster.reach(saved + 5)
  chief.kill()
  chief.wait()
  chief = cluster.start('chief')
  cluster.reach(saved + 5)
  assert 'Continuing from ' in chief.stdout_path.read_text()

  cluster.processes['ps', 0].kill()
  codes = cluster.codes(60)
  assert (codes['chief', 0], codes['worker', 0]) == (1, 1)
  for job in 'chief', 'worker':  # TensorFlow may complain, too, before.
    *_, line = cluster.processes[
        job, 0].stderr_path.read_text().splitlines()
    assert re.fullmatch(r'cifar10_train\.py: ps 0 at \S+ is gone, .*', line)
  cluster.start_all()
  assert set(cluster.codes(60).values()) == {0}
  assert _saved_step(tmp_path / 'train') == 50


def test_workers_need_not_wait_for_each_other(tasks, tmp_path):
  cluster = tasks(
      1, '--max_steps=20', '--nosync_replicas', '--use_bfloat16')
  cluster.start('ps')
  cluster.start('chief')
  cluster.reach(19)
  assert set(cluster.codes(10).values()) == {0}  # No worker ever came.
  assert _saved_step(tmp_path / 'train') == 20


def test_task_that_never_comes_is_named(set_flags, monkeypatch, capsys):
  set_flags(cluster_timeout_secs=9)
  jobs = _jobs(workers=1)
  address, = jobs['worker']
  server = cifar10_train.Cluster(jobs, 'ps', 0)
  chief = cifar10_train.Cluster(jobs, 'chief', 0)
  now = time.time()
  for secs in (4, 8, 12):  # The worker is needed when no step is done.
    monkeypatch.setattr(cifar10_train.time, 'time', lambda: now + secs)
    chief._look_around()
    chief.check()
  assert capsys.readouterr().out == 'Waiting for worker 0 at %s.\n' % address
  monkeypatch.setattr(cifar10_train.time, 'time', lambda: now + 14)
  chief._look_around()
  with pytest.raises(UserError, match=re.escape(
      'worker 0 at %s did not come in --cluster_timeout_secs=9.' % address)):
    chief.check()
  assert server.target

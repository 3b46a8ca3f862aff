"""Both trainers: towers that learn as one, runs that end and go on as promised.

What a step computes is tested on graphs in this process; so are continued runs.
What ends a process from outside is tested on processes of their own.
"""
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest

import cifar10
import cifar10_multi_gpu_train
import cifar10_train
from cifar10_input import CIFAR10, tf
from conftest import SCRIPTS

# The line that people parse, to the letter.
STEP_LINE = re.compile(
    r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: step (\d+), loss = (\d+\.\d\d) '
    r'\((\d+\.\d) examples/sec; (\d+\.\d{3}) sec/batch\)')

LAYERS = ('conv1', 'conv2', 'local3', 'local4', 'softmax_linear')

TAGS = {
    'images/image/0', 'images/image/1', 'images/image/2', 'learning_rate',
    'conv1/filters/image/0',
    *(layer + '/' + kind for layer in LAYERS for kind in (
        'activations', 'sparsity', 'weights', 'weights/gradients', 'biases',
        'biases/gradients')),
    *(loss + kind for loss in (
        'cross_entropy', 'local3/weight_loss', 'local4/weight_loss',
        'total_loss') for kind in ('', ' (raw)')),
}

BUILDERS = {
    'cifar10_train': (cifar10_train, {}),
    'cifar10_multi_gpu_train': (cifar10_multi_gpu_train, {'num_gpus': 2}),
}


def _steps(stdout):
  """Returns the steps of all lines that tell one."""
  return [int(STEP_LINE.fullmatch(line)[1])
          for line in stdout.splitlines() if ': step ' in line]


def _saved_step(train_dir):
  checkpoint = tf.train.latest_checkpoint(str(train_dir))
  return int(checkpoint.rsplit('-')[-1]) if checkpoint else None


# Towers.


def _batch(size):
  random = np.random.default_rng(0)
  images = random.standard_normal((size, 24, 24, 3)).astype(np.float32)
  return tf.constant(images), tf.constant(
      random.integers(0, 10, size).astype(np.int32))


def test_two_towers_of_64_have_the_gradients_of_one_batch_of_128():
  images, labels = _batch(128)
  optimizer = tf.train.GradientDescentOptimizer(0.1)
  tower_grads = []
  for i in range(2):
    with tf.variable_scope(tf.get_variable_scope(), reuse=i > 0), \
        tf.name_scope('tower_%d' % i) as scope:
      loss = cifar10_multi_gpu_train.tower_loss(
          scope, images[64 * i:64 * (i + 1)], labels[64 * i:64 * (i + 1)])
      tower_grads.append(optimizer.compute_gradients(loss))
  averaged = cifar10_multi_gpu_train.average_gradients(tower_grads)
  with tf.variable_scope(tf.get_variable_scope(), reuse=True), \
      tf.name_scope('whole') as scope:
    whole = optimizer.compute_gradients(
        cifar10.loss(cifar10.inference(images), labels, scope))
  assert [variable for _, variable in averaged] == tf.trainable_variables()
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    averaged, whole = session.run([
        {variable.op.name: gradient for gradient, variable in gradients}
        for gradients in (averaged, whole)])
  assert len(averaged) == len(whole) == 10
  for name, gradient in whole.items():
    assert abs(gradient).max() > 0
    np.testing.assert_allclose(
        averaged[name], gradient, atol=1e-5 * abs(gradient).max())


def test_average_gradients_averages_over_towers():
  v, w = (tf.get_variable(name, initializer=[0.0, 0.0]) for name in 'vw')
  averaged = cifar10_multi_gpu_train.average_gradients([
      [(tf.constant([1.0, 2.0]), v), (tf.constant([10.0, 0.0]), w)],
      [(tf.constant([2.0, 2.0]), v), (tf.constant([20.0, 1.0]), w)],
      [(tf.constant([6.0, 5.0]), v), (tf.constant([60.0, 8.0]), w)]])
  assert [variable for _, variable in averaged] == [v, w]
  with tf.Session() as session:
    result = session.run([gradient for gradient, _ in averaged])
  np.testing.assert_allclose(result, [[3, 3], [30, 3]], rtol=1e-6)


def _build(trainer, dataset):
  return trainer.build_step(dataset, tf.train.get_or_create_global_step())


def test_operations_are_named_after_their_tower(use_tiny, tiny, set_flags):
  set_flags(num_gpus=2)
  _build(cifar10_multi_gpu_train, tiny)
  names = {op.name for op in tf.get_default_graph().get_operations()}
  assert {'tower_0/conv1/Conv2D', 'tower_1/conv1/Conv2D'} <= names
  assert not any(name.startswith('tower_2') for name in names)


@pytest.mark.parametrize('num_gpus', [1, 3])
def test_towers_share_the_variables_of_one_device(
    use_tiny, tiny, set_flags, num_gpus):
  _build(cifar10_train, tiny)
  expected = {v.op.name: v.shape for v in tf.global_variables()}
  with tf.Graph().as_default():
    set_flags(num_gpus=num_gpus)
    _build(cifar10_multi_gpu_train, tiny)
    assert {v.op.name: v.shape for v in tf.global_variables()} == expected
    assert {v.device for v in tf.trainable_variables()} == {'/device:CPU:0'}


def test_each_tower_has_images_of_its_own(
    use_tiny, tiny, set_flags, monkeypatch, session):
  seen = []
  inference = cifar10.inference
  monkeypatch.setattr(cifar10, 'inference', lambda images, *arguments: (
      seen.append(images), inference(images, *arguments))[1])
  set_flags(num_gpus=2)
  _build(cifar10_multi_gpu_train, tiny)
  first, second = session().run(seen)
  assert first.shape == second.shape == (8, 24, 24, 3)
  assert abs(first - second).max() > 0.1


def test_reported_loss_is_the_mean_over_all_towers(
    use_tiny, tiny, set_flags, session):
  set_flags(num_gpus=3)
  _, loss = _build(cifar10_multi_gpu_train, tiny)
  loss, *towers = session().run(
      [loss] + ['tower_%d/total_loss:0' % i for i in range(3)])
  assert len(set(towers)) == 3
  assert loss == pytest.approx(np.mean(towers), rel=1e-6)


def test_epochs_of_the_learning_rate_are_counted_over_all_towers(
    set_flags, monkeypatch):
  set_flags(batch_size=128, num_gpus=2)
  monkeypatch.setattr(
      cifar10, 'distorted_inputs',
      lambda dataset, size, *unused: _batch(size))
  _build(cifar10_multi_gpu_train, CIFAR10)
  summary, = (summary for summary in tf.get_collection(tf.GraphKeys.SUMMARIES)
              if tf.get_static_value(summary.op.inputs[0]) == b'learning_rate')
  with tf.Session() as session:
    for step, rate in [(0, 0.1), (68358, 0.1), (68360, 0.01), (136719, 0.001)]:
      session.run(tf.assign(tf.train.get_global_step(), step))
      value, = tf.Summary.FromString(session.run(summary)).value
      assert value.simple_value == pytest.approx(rate, rel=1e-5)


def test_towers_move_the_averages_after_the_variables(
    use_tiny, tiny, set_flags, session):
  set_flags(num_gpus=2)
  train_op, _ = _build(cifar10_multi_gpu_train, tiny)
  variables = {v.op.name: v for v in tf.global_variables()}
  pair = [variables['conv2/biases'],
          variables['conv2/biases/ExponentialMovingAverage']]
  run = session()
  _, old = run.run(pair)
  run.run(train_op)
  new, average = run.run(pair)
  assert abs(new - old).max() > 0
  np.testing.assert_allclose(
      average, 2 / 11 * old + 9 / 11 * new, rtol=1e-5, atol=1e-7)


# Summaries.


@pytest.mark.parametrize('script', BUILDERS)
def test_summaries_have_clean_tags_the_same_in_both_trainers(
    use_tiny, tiny, set_flags, session, script):
  trainer, flags = BUILDERS[script]
  set_flags(**flags)
  _build(trainer, tiny)
  summary = tf.summary.merge_all()
  summary = tf.Summary.FromString(session().run(summary))
  tags = [value.tag for value in summary.value]
  assert len(tags) == len(set(tags))
  fullness = {tag for tag in tags if re.search('fraction|full', tag)}
  assert any('shuffle' in tag for tag in fullness)
  assert set(tags) - fullness == TAGS
  for tag in tags:
    parts = tag.split('/')
    assert all(part != next for part, next in zip(parts, parts[1:]))
    assert not re.search(r'_\d+(/|$)|tower_', tag)


def test_event_files_hold_summaries_speed_and_graph(trained, events):
  found = events(trained.train_dir)
  tags = {tag for _, tag, _ in found}
  assert TAGS | {'global_step/sec'} <= tags
  assert {step for step, tag, _ in found if tag == 'total_loss (raw)'} >= {
      1, 6, 11}
  first, = (value.simple_value for step, tag, value in found
            if tag == 'total_loss (raw)' and step == 1)
  assert first == pytest.approx(4.68, abs=0.1)
  path, = trained.train_dir.glob('events.out.*')
  graphs = [event.graph_def for event in tf.train.summary_iterator(str(path))
            if event.HasField('graph_def')]
  names = {node.name for node in tf.GraphDef.FromString(graphs[0]).node}
  assert {name.split('/')[0] for name in names} >= {
      'input', 'train', *LAYERS}


# A run.


def test_run_prints_the_lines_that_people_parse(trained):
  assert trained.code == 0
  filling, *lines = trained.stdout.splitlines()
  assert filling.startswith(
      'Filling queue with 4000 synthetic images before starting to train.')
  parsed = [STEP_LINE.fullmatch(line) for line in lines]
  assert [int(match[1]) for match in parsed] == [0, 5, 10]
  assert float(parsed[0][2]) == pytest.approx(4.68, abs=0.1)
  for match in parsed:
    assert 8 / float(match[3]) == pytest.approx(
        float(match[4]), rel=0.02, abs=0.001)


def test_run_leaves_the_console_free_of_chatter(trained):
  assert trained.stderr == ''


def test_tensorflow_does_not_doubt_on_the_console_that_steps_are_counted(
    tmp_path, caplog):
  # Its hook reads the step while it is raised, and may see a number twice. Here
  # it does so every time.
  step = tf.identity(tf.train.get_or_create_global_step())
  with tf.train.MonitoredTrainingSession(
      checkpoint_dir=str(tmp_path), log_step_count_steps=1) as session:
    for _ in range(3):
      session.run(step)
  assert caplog.records == []


def test_run_leaves_a_checkpoint_that_the_original_can_load(trained):
  checkpoint = tf.train.latest_checkpoint(str(trained.train_dir))
  assert os.path.basename(checkpoint) == 'model.ckpt-11'
  reader = tf.train.load_checkpoint(checkpoint)
  shapes = reader.get_variable_to_shape_map()
  kinds = reader.get_variable_to_dtype_map()
  assert {name for name in shapes if not name.endswith('/avg')} == {
      'global_step', *(layer + '/' + kind + average for layer in LAYERS
                       for kind in ('weights', 'biases')
                       for average in ('', '/ExponentialMovingAverage'))}
  assert kinds['global_step'] == tf.int64
  assert reader.get_tensor('global_step') == 11
  assert shapes['local3/weights'] == [2304, 384]


@pytest.mark.parametrize('start, frequency, expected', [
    (0, 10, ['0: 32.0; 0.500', '10: 8.0; 2.000', '20: 8.0; 2.000']),
    (7, 5, ['10: 9.8; 1.625', '15: 8.0; 2.000', '20: 8.0; 2.000',
            '25: 8.0; 2.000']),
])
def test_speed_is_the_mean_over_the_steps_since_the_last_line(
    set_flags, monkeypatch, capsys, start, frequency, expected):
  now = [1000.0]
  monkeypatch.setattr(cifar10_train.time, 'time', lambda: now[0])
  set_flags(log_frequency=frequency)
  global_step = tf.train.get_or_create_global_step()
  step = tf.assign_add(global_step, 1)
  initial = tf.group(global_step.initializer)
  with tf.control_dependencies([initial]):
    initial = tf.assign(global_step, start)
  hook = cifar10_train.LoggerHook(tf.constant(1.5), step, 16)
  with tf.train.MonitoredSession(
      tf.train.ChiefSessionCreator(tf.train.Scaffold(init_op=initial)),
      [hook]) as session:
    for i in range(21):
      now[0] += 2.0 if i else 0.5
      session.run(step)
  assert [
      '%s: %s; %s' % STEP_LINE.fullmatch(line).group(1, 3, 4)
      for line in capsys.readouterr().out.splitlines()] == expected


@pytest.mark.parametrize('seeds, same', [((7, 7), True), ((7, 8), False)])
def test_seed_repeats_the_initial_weights(
    use_tiny, call_script, tmp_path, seeds, same):
  weights = []
  for run, seed in enumerate(seeds):
    train_dir = tmp_path / str(run)
    assert call_script(
        cifar10_train.main, '--train_dir=%s' % train_dir, '--max_steps=1',
        '--seed=%d' % seed).code == 0
    weights.append(tf.train.load_variable(
        str(train_dir / 'model.ckpt-0'), 'conv1/weights'))
  assert np.array_equal(*weights) == same


@pytest.mark.parametrize('flags, complaint', [
    ([], r'the loss is (nan|inf) at step [1-4]\b'),
    (['--save_summary_steps=1'], 'a gradient is not finite')])
def test_loss_that_is_not_a_number_ends_the_run_in_one_line(
    use_tiny, call_script, tmp_path, flags, complaint):
  run = call_script(
      cifar10_train.main, '--train_dir=%s' % tmp_path, '--max_steps=10',
      '--learning_rate=1e30', *flags)
  assert run.code == 1
  assert re.fullmatch(r'script\.py: %s.*\n' % complaint, run.stderr)
  assert _saved_step(tmp_path) == 0


def test_train_dir_that_is_a_file_is_refused_in_one_line(
    use_tiny, call_script, tmp_path):
  (tmp_path / 'file').write_text('mine')
  run = call_script(
      cifar10_train.main, '--train_dir=%s' % (tmp_path / 'file'))
  assert run.code == 1
  assert run.stderr.count('\n') == 1
  assert '--train_dir=%s' % (tmp_path / 'file') in run.stderr
  assert (tmp_path / 'file').read_text() == 'mine'


def test_spoilt_data_is_reported_in_one_line(
    use_tiny, tiny, tiny_dir, set_flags, call_script, tmp_path):
  shutil.copytree(tiny_dir, tmp_path / 'data')
  path = tmp_path / 'data' / tiny.folder / 'first.bin'
  os.truncate(path, 3073)
  set_flags(data_dir=str(tmp_path / 'data'))
  run = call_script(
      cifar10_train.main, '--train_dir=%s' % (tmp_path / 'run'))
  assert run.code == 1
  assert run.stderr.count('\n') == 1
  assert str(path) in run.stderr


# Going on.


@pytest.fixture
def earlier_run(trained, tmp_path):
  """A train_dir with eleven steps done and a file that is not the suite's."""
  train_dir = tmp_path / 'run'
  _copy_run(trained.train_dir, train_dir)
  (train_dir / 'notes.txt').write_text('mine')
  return train_dir


def _copy_run(source, train_dir):
  shutil.copytree(source, train_dir)
  tf.train.update_checkpoint_state(
      str(train_dir), 'model.ckpt-%d' % _saved_step(source))


def _contents(folder):
  return {str(path.relative_to(folder)): path.read_bytes()
          for path in folder.rglob('*')
          if path.is_file() and path.name != '.lock'}


def test_run_with_more_steps_continues_at_the_saved_step(
    use_tiny, call_script, earlier_run):
  before = _contents(earlier_run)
  run = call_script(
      cifar10_train.main, '--train_dir=%s' % earlier_run, '--max_steps=14',
      '--log_frequency=1')
  assert run.code == 0
  assert 'Continuing from %s' % (earlier_run / 'model.ckpt-11') in run.stdout
  assert _steps(run.stdout) == [11, 12, 13]
  assert _saved_step(earlier_run) == 14
  after = _contents(earlier_run)
  assert set(before) < set(after)
  for name, content in before.items():
    if name == 'notes.txt' or name.startswith(('events.', 'model.ckpt-0.')):
      assert after[name] == content


def test_continued_run_starts_from_the_saved_variables(
    use_tiny, call_script, earlier_run):
  call_script(cifar10_train.main, '--train_dir=%s' % earlier_run,
              '--max_steps=12', '--learning_rate=0')
  for name in ('conv1/weights', 'local4/biases'):
    old, new = (tf.train.load_variable(
        str(earlier_run / ('model.ckpt-%d' % step)), name)
                for step in (11, 12))
    np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize('max_steps', [11, 5])
def test_run_that_has_its_steps_says_so_and_changes_nothing(
    use_tiny, call_script, earlier_run, max_steps):
  before = _contents(earlier_run)
  run = call_script(
      cifar10_train.main, '--train_dir=%s' % earlier_run,
      '--max_steps=%d' % max_steps)
  assert run.code == 0
  assert 'trained for 11 steps already' in run.stdout
  assert _steps(run.stdout) == []
  assert run.stderr == ''
  assert _contents(earlier_run) == before


def test_overwrite_starts_anew_and_removes_only_what_the_suite_wrote(
    use_tiny, call_script, earlier_run):
  foreign = ('notes.txt', 'checkpoint.bak', 'my_model.ckpt-3.index',
             'model.ckpt-best.index', 'sub/model.ckpt-11.index')
  (earlier_run / 'sub').mkdir()
  for name in foreign:
    (earlier_run / name).write_text(name)
  old_events, = earlier_run.glob('events.out.*')
  old_events.rename(earlier_run / 'events.out.tfevents.1.elsewhere')
  run = call_script(
      cifar10_train.main, '--train_dir=%s' % earlier_run, '--overwrite',
      '--max_steps=2', '--log_frequency=1')
  assert run.code == 0
  assert 'Continuing' not in run.stdout
  assert _steps(run.stdout) == [0, 1]
  contents = _contents(earlier_run)
  for name in foreign:
    assert contents[name] == name.encode()
  assert not any(name.startswith('model.ckpt-11.') for name in contents)
  assert 'events.out.tfevents.1.elsewhere' not in contents


def test_train_dir_that_was_moved_continues_where_it_is(
    use_tiny, call_script, tmp_path):
  call_script(cifar10_train.main, '--train_dir=%s' % (tmp_path / 'old'),
              '--max_steps=1')
  (tmp_path / 'old').rename(tmp_path / 'new')
  run = call_script(
      cifar10_train.main, '--train_dir=%s' % (tmp_path / 'new'),
      '--max_steps=3', '--log_frequency=1')
  assert _steps(run.stdout) == [1, 2]


def test_checkpoint_of_another_network_is_refused_in_one_line(
    use_tiny, call_script, tmp_path):
  with tf.Graph().as_default(), tf.Session() as session:
    tf.train.get_or_create_global_step()
    tf.get_variable('conv1/weights', [3, 3, 3, 32])
    session.run(tf.global_variables_initializer())
    tf.train.Saver().save(session, str(tmp_path / 'model.ckpt'), global_step=3)
  before = _contents(tmp_path)
  run = call_script(cifar10_train.main, '--train_dir=%s' % tmp_path)
  assert run.code == 1
  assert run.stderr.count('\n') == 1
  assert 'conv1/weights is [3, 3, 3, 32] there and [5, 5, 3, 64] here' in (
      run.stderr)
  assert _contents(tmp_path) == before


# Runs that something ends.


@pytest.fixture(scope='module')
def interrupted(start_script, wait_until, finish, synthetic_dir,
                tmp_path_factory):
  """Two runs at once, each ended in mid-run by a signal of its own."""
  runs = {}
  for signum in (signal.SIGTERM, signal.SIGKILL):
    train_dir = tmp_path_factory.mktemp(signum.name)
    runs[signum] = train_dir, start_script(
        'cifar10_train', '--dataset=synthetic', '--data_dir=%s' % synthetic_dir,
        '--train_dir=%s' % train_dir, '--batch_size=8', '--log_frequency=5',
        '--save_checkpoint_secs=%d' % (1 if signum == signal.SIGKILL else 600))
  for signum, (train_dir, process) in runs.items():
    if signum == signal.SIGKILL:
      wait_until(process, lambda: _saved_step(train_dir))
    else:
      wait_until(process, lambda: 'step 10,' in process.stdout_path.read_text())
    process.send_signal(signum)
    runs[signum] = finish(process)
    runs[signum].train_dir = train_dir
  return runs


def test_sigterm_ends_the_process_with_a_checkpoint_of_the_step_reached(
    interrupted):
  run = interrupted[signal.SIGTERM]
  assert run.code == 143
  assert run.stderr == ''
  saved = _saved_step(run.train_dir)
  assert saved > 10
  assert _steps(run.stdout)[-1] == (saved - 1) // 5 * 5
  assert 'SIGTERM' in run.stdout.splitlines()[-1]


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_run_continues_at_the_saved_step(
    use_tiny, call_script, interrupted, signum):
  train_dir = interrupted[signum].train_dir
  saved = _saved_step(train_dir)
  assert saved > 0
  before = set(_contents(train_dir))
  run = call_script(
      cifar10_train.main, '--train_dir=%s' % train_dir,
      '--max_steps=%d' % (saved + 2), '--log_frequency=1')
  assert run.code == 0
  assert 'Continuing from %s' % train_dir in run.stdout
  assert _steps(run.stdout) == [saved, saved + 1]
  assert _saved_step(train_dir) == saved + 2
  kept = {name for name in before if 'model.ckpt-%d.' % saved in name
          or name.startswith('events')}
  assert len(kept) > 3
  assert kept <= set(_contents(train_dir))


class _SignalHook(tf.train.SessionRunHook):
  """Sends this process a signal in its third step."""

  step = 0

  def __init__(self, signum):
    self._signum = signum
    self._steps = 0

  def before_run(self, run_context):
    self._steps += 1
    if self._steps == 3:
      os.kill(os.getpid(), self._signum)


@pytest.mark.parametrize('signum, code', [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize('script', BUILDERS)
def test_signal_ends_training_after_the_step_it_came_in(
    use_tiny, call_script, tmp_path, monkeypatch, script, signum, code):
  monkeypatch.setattr(
      cifar10_train, 'LoggerHook', lambda *unused: _SignalHook(signum))
  run = call_script(
      BUILDERS[script][0].main, '--train_dir=%s' % tmp_path, '--max_steps=9')
  assert run.code == code
  assert run.stderr == ''
  assert signum.name in run.stdout.splitlines()[-1]
  assert _saved_step(tmp_path) == 3


# The trainer on several GPUs.


@pytest.fixture(scope='module')
def trained_on_towers(run_script, synthetic_dir, tmp_path_factory):
  train_dir = tmp_path_factory.mktemp('towers')
  run = run_script(
      'cifar10_multi_gpu_train', '--dataset=synthetic',
      '--data_dir=%s' % synthetic_dir, '--train_dir=%s' % train_dir,
      '--batch_size=4', '--num_gpus=2', '--max_steps=6', '--log_frequency=5',
      '--use_fp16')
  run.train_dir = train_dir
  return run


def test_towers_train_and_say_on_which_devices(trained_on_towers):
  run = trained_on_towers
  assert run.code == 0
  assert _steps(run.stdout) == [0, 5]
  for i in range(2):
    assert re.search(r'^tower_%d is on /[cg]pu:\d' % i, run.stdout, re.M)
  gpus = len(tf.config.list_physical_devices('GPU'))
  assert ('There are %d GPUs for --num_gpus=2' % gpus in run.stdout) == (
      gpus < 2)
  assert _saved_step(run.train_dir) == 6


@pytest.mark.skipif(
    bool(tf.config.list_physical_devices('GPU')), reason='there is a GPU')
def test_use_fp16_warns_once_that_it_is_slow_on_a_cpu(trained_on_towers):
  warning, = re.findall('.*use_fp16.*', trained_on_towers.stderr)
  assert re.search('CPU.* slow', warning)


def test_run_on_towers_continues_on_one_device_and_back(
    use_tiny, call_script, trained_on_towers, tmp_path):
  train_dir = tmp_path / 'run'
  _copy_run(trained_on_towers.train_dir, train_dir)
  for main, max_steps in [(cifar10_train.main, 8),
                          (cifar10_multi_gpu_train.main, 10)]:
    run = call_script(
        main, '--train_dir=%s' % train_dir, '--max_steps=%d' % max_steps,
        '--log_frequency=1', '--num_gpus=2')
    assert run.code == 0
    assert _steps(run.stdout) == [max_steps - 2, max_steps - 1]
  assert _saved_step(train_dir) == 10


# A reader's own script.


@pytest.fixture
def cifar10_dir(tmp_path):
  """A data directory with six files as large as CIFAR-10's, of noise."""
  folder = tmp_path / 'data' / CIFAR10.folder
  folder.mkdir(parents=True)
  random = np.random.default_rng(0)
  records = random.integers(0, 256, (10000, 3073), np.uint8)
  records[:, 0] %= 10
  first, *others = (folder / name for name in CIFAR10.files)
  records.tofile(first)
  for path in others:
    os.link(first, path)
  yield folder.parent
  shutil.rmtree(folder)


def test_script_that_knows_the_tutorial_alone_runs_unchanged(
    run_script, cifar10_dir, tmp_path):
  script = os.path.join(os.path.dirname(__file__), 'readers_script.py')
  run = run_script(
      os.path.abspath(script), '--data_dir=%s' % cifar10_dir,
      '--train_dir=%s' % (tmp_path / 'run'), '--max_steps=3')
  assert run.code == 0, run.stderr
  lines = re.findall(r'^my step (\d): loss (\d\.\d\d), ', run.stdout, re.M)
  assert [step for step, _ in lines] == ['0', '1', '2']
  assert float(lines[0][1]) == pytest.approx(4.68, abs=0.05)
  assert _saved_step(tmp_path / 'run') == 3
  shapes = tf.train.load_checkpoint(
      str(tmp_path / 'run')).get_variable_to_shape_map()
  assert shapes['conv1/weights/ExponentialMovingAverage'] == [5, 5, 3, 64]


# Flags.


FLAGS_OF = {
    'cifar10_train': [
        'train_dir', 'max_steps', 'log_frequency', '[no]log_device_placement',
        '[no]overwrite', 'save_checkpoint_secs', 'save_summary_steps', 'seed'],
    'cifar10_eval': [
        'eval_dir', 'eval_data', 'checkpoint_dir', 'eval_interval_secs',
        'eval_timeout_secs', 'num_examples', '[no]run_once'],
}
FLAGS_OF['cifar10_multi_gpu_train'] = FLAGS_OF['cifar10_train'] + ['num_gpus']

DEFAULTS = {
    'batch_size': 128, 'data_dir': '/tmp/cifar10_data', 'use_fp16': False,
    'dataset': 'cifar10', 'train_dir': '/tmp/cifar10_train',
    'max_steps': 100000, 'log_frequency': 10, 'log_device_placement': False,
    'overwrite': False, 'save_checkpoint_secs': 600, 'save_summary_steps': 100,
    'num_gpus': 1, 'eval_dir': '/tmp/cifar10_eval', 'eval_data': 'test',
    'checkpoint_dir': '/tmp/cifar10_train', 'eval_interval_secs': 300,
    'eval_timeout_secs': 0, 'num_examples': 10000, 'run_once': False,
}


@pytest.mark.parametrize('name', DEFAULTS)
def test_default_is_as_documented(name):
  assert tf.flags.FLAGS[name].default == DEFAULTS[name]


POSITIVE = ('batch_size', 'max_steps', 'log_frequency', 'save_checkpoint_secs',
            'save_summary_steps', 'num_gpus', 'num_examples')

BAD_FLAGS = [
    *('--%s=%s' % (name, value)
      for name in POSITIVE for value in ('0', '-1', 'x', '1.5', '')),
    '--eval_interval_secs=-1', '--eval_timeout_secs=-1', '--seed=x',
    '--use_fp16=maybe', '--run_once=2', '--overwrite=x',
    '--log_device_placement=x', '--eval_data=foo', '--dataset=mnist',
    '--data_url=ftp://example.com/x', '--data_url=example.com',
    '--data_sha256=abc', '--data_sha256=%s' % (64 * 'g'),
]


@pytest.mark.parametrize('flag', BAD_FLAGS)
def test_bad_value_of_a_flag_is_explained_in_one_line(call_script, flag):
  run = call_script(lambda argv: pytest.fail('main was called'), flag)
  assert run.code == 2
  assert run.stdout == ''
  assert run.stderr.count('\n') == 1
  assert run.stderr.startswith('script.py: ')
  name, value = flag.lstrip('-').split('=')
  assert name in run.stderr and value in run.stderr


@pytest.mark.parametrize('flag, allowed', [
    ('--batch_size=0', '[1, 1000000]'),
    ('--max_steps=x', 'positive integer'),
    ('--eval_timeout_secs=-1', 'non-negative integer'),
    ('--eval_data=foo', 'test|train_eval'),
    ('--dataset=x', 'cifar10, cifar100, svhn, synthetic'),
    ('--data_url=x', 'https://'),
    ('--data_sha256=x', '64 hexadecimal digits'),
    ('--use_fp16=x', 'true')])
def test_complaint_about_a_flag_says_what_is_allowed(
    call_script, flag, allowed):
  assert allowed in call_script(None, flag).stderr


def test_flags_that_exclude_each_other_are_explained_in_one_line(call_script):
  run = call_script(None, '--use_fp16', '--use_bfloat16')
  assert run.code == 2
  assert re.fullmatch(
      r'script\.py: .*use_fp16.*use_bfloat16.*\n', run.stderr)


@pytest.mark.parametrize(
    'argument', ['--nonsense=1', 'stray', '--data_dir', '--norun_once=3'])
def test_argument_that_is_no_flag_is_explained_in_one_line(
    call_script, argument):
  run = call_script(lambda argv: pytest.fail('main was called'), argument)
  assert run.code == 2
  assert run.stderr.count('\n') == 1
  assert argument.lstrip('-').split('=')[0] in run.stderr


def _listed_flags(help):
  return set(re.findall(r'^  (?:-\w,)?--([\[\]\w]+):', help, re.M))


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_shows_what_a_script_is_for_and_its_flags(
    monkeypatch, call_script, script):
  monkeypatch.setitem(sys.modules, '__main__', sys.modules[script])
  run = call_script(None, '--help', name=script)
  assert run.code == 0
  assert run.stderr == ''
  assert run.stdout.startswith('Train' if 'train' in script else 'Evaluate')
  assert 'python %s.py' % script in run.stdout
  assert _listed_flags(run.stdout) >= {
      'batch_size', 'data_dir', '[no]use_fp16', *FLAGS_OF[script]}


def test_help_of_a_process_lists_the_flags_of_all_modules(run_script):
  run = run_script('cifar10_multi_gpu_train', '--help')
  assert run.code == 0
  assert run.stderr == ''
  assert _listed_flags(run.stdout) >= {
      'batch_size', 'data_dir', '[no]use_fp16', 'dataset', 'data_url',
      'data_sha256', *FLAGS_OF['cifar10_multi_gpu_train']}


def test_flag_of_another_script_ends_the_process_in_one_line(run_script):
  run = run_script('cifar10_train', '--run_once')
  assert run.code == 2
  assert run.stdout == ''
  assert re.fullmatch(r'cifar10_train\.py: .*run_once.*\n', run.stderr)

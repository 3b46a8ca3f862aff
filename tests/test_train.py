"""cifar10_train.py: what a run prints and leaves, how it goes on, its flags."""
import importlib
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import sys
import threading

import numpy as np
import pytest

import cifar10
import cifar10_eval
import cifar10_multi_gpu_train
import cifar10_train
from conftest import (
    FLAGS, ROOT, SCRIPTS, STEP_LINE, TINY, contents, events, finish,
    is_one_line, newest_step, parse_flags, printed_steps, tf)

LAYERS = ('conv1', 'conv2', 'local3', 'local4', 'softmax_linear')


# A run.


def test_run_prints_the_lines_that_people_parse_and_no_others(trained):
  assert (trained.code, trained.stderr) == (0, '')
  filling, *lines, done = trained.stdout.splitlines()
  assert filling.startswith(
      'Filling queue with 4000 synthetic images before starting to train.')
  parsed = [STEP_LINE.fullmatch(line) for line in lines]
  assert [int(match[1]) for match in parsed] == [0, 5, 10]
  assert float(parsed[0][2]) == pytest.approx(4.68, abs=0.1)
  for match in parsed:
    assert 8 / float(match[3]) == pytest.approx(
        float(match[4]), rel=0.02, abs=0.001)
  assert re.fullmatch(
      r'Trained up to step 11 in 0:0\d:\d\d\. To evaluate it: python '
      'cifar10_eval.py --run_once --checkpoint_dir=%s' % trained.train_dir,
      done)


def test_run_leaves_a_checkpoint_that_the_original_can_load(trained):
  checkpoint = tf.train.latest_checkpoint(str(trained.train_dir))
  assert os.path.basename(checkpoint) == 'model.ckpt-11'
  names = {name for name, _ in tf.train.list_variables(checkpoint)}
  assert {name for name in names if not name.endswith('/avg')} == {
      'global_step', *(layer + '/' + kind + average for layer in LAYERS
                       for kind in ('weights', 'biases')
                       for average in ('', '/ExponentialMovingAverage'))}
  step = tf.train.load_variable(checkpoint, 'global_step')
  assert step == 11 and step.dtype == np.int64


def test_event_file_holds_summaries_speed_and_graph(trained):
  found = events(trained.train_dir)
  tags = [tag for step, tag, _ in found if step == 6]
  assert len(set(tags)) == len(tags)
  fullness = {tag for _, tag, _ in found if re.search('full', tag)}
  assert any('shuffle' in tag for tag in fullness)
  assert {tag for step, tag, _ in found if step} - fullness == {
      'images/image/0', 'images/image/1', 'images/image/2', 'learning_rate',
      'conv1/filters/image/0', 'global_step/sec', 'Precision @ 1',
      *(layer + '/' + kind for layer in LAYERS for kind in (
          'activations', 'sparsity', 'weights', 'weights/gradients', 'biases',
          'biases/gradients')),
      *(loss + kind for loss in (
          'cross_entropy', 'local3/weight_loss', 'local4/weight_loss',
          'total_loss') for kind in ('', ' (raw)'))}
  assert {step for step, *_ in found} == {0, 1, 6, 11}
  shown = {tag: value for step, tag, value in found if not step}
  assert set(shown) == {'configuration', '_hparams_/session_start_info'}
  table = tf.make_ndarray(shown['configuration'].tensor).item().decode()
  given = re.search(r'^\| --batch_size \| 8 \|$', table, re.MULTILINE)
  assert given.start() < table.index('--learning_rate') < table.index(
      '| tensorflow | %s |' % tf.version.VERSION)
  path, = trained.train_dir.glob('events.out.*')
  graph = next(event.graph_def for event in tf.train.summary_iterator(str(path))
               if event.HasField('graph_def'))
  assert {node.name.split('/')[0] for node in tf.GraphDef.FromString(
      graph).node} >= {'input', 'train', *LAYERS}


def test_console_tells_no_doubts_that_steps_are_counted(tmp_path, caplog):
  # TensorFlow's hook reads the step while it is raised, and may see a number
  # twice. Here it does so every time.
  step = tf.identity(tf.train.get_or_create_global_step())
  with tf.train.MonitoredTrainingSession(
      checkpoint_dir=str(tmp_path), log_step_count_steps=1) as session:
    for _ in range(3):
      session.run(step)
  assert caplog.records == []


@pytest.mark.parametrize('start, flags, expected', [
    (0, ['--log_frequency=10', '--max_steps=41'],
     ['0: 32.0; 0.500', '10: 8.0; 2.000', '20: 8.0; 2.000']),
    (7, ['--log_frequency=5', '--max_steps=100000'],
     ['10: 9.8; 1.625', '15: 8.0; 2.000',
      '99984 steps left, about 2 days, 7:32:48.', '20: 8.0; 2.000',
      '25: 8.0; 2.000'])])
def test_speed_is_the_mean_over_the_steps_since_the_last_line(
    monkeypatch, capsys, start, flags, expected):
  parse_flags(cifar10_train, *flags)
  now = [1000.0]
  monkeypatch.setattr(cifar10_train.time, 'monotonic', lambda: now[0])
  global_step = tf.train.get_or_create_global_step()
  step = tf.assign_add(global_step, 1)
  with tf.control_dependencies([global_step.initializer]):
    initial = tf.assign(global_step, start)
  hook = cifar10_train.LoggerHook(
      tf.constant(1.5), step, 16, cifar10_train.Task())
  with tf.train.MonitoredSession(
      tf.train.ChiefSessionCreator(tf.train.Scaffold(init_op=initial)),
      [hook]) as session:
    for i in range(21):
      now[0] += 2.0 if i else 0.5
      session.run(step)
  assert [
      STEP_LINE.sub(r'\1: \3; \4', line)
      for line in capsys.readouterr().out.splitlines()] == expected


@pytest.mark.parametrize('flags, complaint', [
    ([], 'the loss at step [1-4] is not finite'),
    (['--save_summary_steps=1'], 'a gradient is not finite')])
def test_loss_that_is_not_a_number_ends_the_run_in_one_line(
    train, tmp_path, flags, complaint):
  run = train('--max_steps=10', '--learning_rate=1e30', *flags)
  assert is_one_line(run, 'finite: lower --learning_rate (now 1e+30)')
  assert re.match('script.py: ' + complaint, run.stderr)
  assert newest_step(tmp_path / 'run') == 0


def test_seed_repeats_the_initial_weights(train, tmp_path):
  weights = []
  for name, seed in (('one', 7), ('two', 7), ('other', 8)):
    assert train('--train_dir=%s' % (tmp_path / name), '--seed=%d' % seed,
                 '--max_steps=1').code == 0
    weights.append(tf.train.load_variable(
        str(tmp_path / name / 'model.ckpt-0'), 'conv1/weights'))
  assert (weights[0] == weights[1]).all() and (weights[0] != weights[2]).any()


def test_deterministic_runs_end_with_the_same_bytes(
    start_script, synthetic_dir, tmp_path):
  runs = [start_script(
      'cifar10_train', '--dataset=synthetic', '--data_dir=%s' % synthetic_dir,
      '--train_dir=%s' % (tmp_path / name), '--max_steps=6', '--batch_size=16',
      '--seed=5', '--deterministic', '--recipe=fast') for name in 'ab']
  assert [finish(run).code for run in runs] == [0, 0]
  one, two = (contents(tmp_path / name)['model.ckpt-6.data-00000-of-00001']
              for name in 'ab')
  assert one == two


def test_queue_holds_the_fraction_that_was_asked_for(tiny_flags):
  parse_flags(cifar10_train, *tiny_flags,
              '--min_fraction_of_examples_in_queue=0.1')
  cifar10_train.training_batches(TINY, 8)
  queue, = (op for op in tf.get_default_graph().get_operations()
            if op.type == 'RandomShuffleQueueV2')
  assert queue.get_attr('min_after_dequeue') == 25


# What a run is, which decides how it may go on.


def test_recipe_and_run_file_say_what_the_command_line_does_not(
    train, tmp_path):
  recipe = cifar10.RECIPES['strong']
  assert set(recipe) <= set(cifar10_train.SHAPING_FLAGS)
  run = train('--recipe=strong', '--max_steps=2', '--learning_rate=0.01')
  assert run.code == 0, run.stderr
  written = json.loads((tmp_path / 'run' / 'run.json').read_text())
  assert {name: written['flags'][name] for name in recipe} == {
      **recipe, 'max_steps': 2, 'learning_rate': 0.01, 'batch_size': 8}
  assert written['versions']['tensorflow'] == tf.version.VERSION
  assert written['classes'] == list(TINY.classes)
  variables = dict(tf.train.list_variables(
      str(tmp_path / 'run' / 'model.ckpt-2')))
  assert 'local3/weights/Momentum' in variables
  assert variables['local3/weights'] == [8 * 8 * 64, 384]  # Of 32 pixels.


@pytest.mark.parametrize('text', [
    '', '{"flags": {"max', '[]', '{"flags": 5}',
    '{"flags": {"max_steps": "x"}}', '{"flags": {}, "classes": "ab"}',
    '[' * 99999, os.mkfifo])
def test_run_file_that_cannot_be_used_is_named(train, evaluate, run_dir, text):
  (run_dir / 'run.json').unlink()
  if text is os.mkfifo:
    os.mkfifo(run_dir / 'run.json')
  else:
    (run_dir / 'run.json').write_text(text)
  for run in (train('--max_steps=12'), evaluate('--run_once')):
    assert is_one_line(run, run_dir / 'run.json')


@pytest.mark.parametrize('flags, complaint', [
    ('--recipe=fast --image_size=24', '--recipe=original, not fast'),
    ('--model=local', '--model=default, not local'),
    ('--image_size=28', '--image_size=24, not 28'),
    ('--dataset=cifar10', '--dataset=synthetic, not cifar10')])
def test_run_of_other_flags_is_refused_before_data_are_fetched(
    train, run_dir, tmp_path, flags, complaint):
  before = contents(run_dir)
  run = train('--data_dir=%s' % (tmp_path / 'data'), *flags.split())
  assert is_one_line(run, '%s was trained with %s' % (run_dir, complaint))
  assert contents(run_dir) == before and not (tmp_path / 'data').exists()


def test_rate_that_falls_to_zero_is_not_raised_by_another_number_of_steps(
    train, tmp_path):
  assert train('--max_steps=1', '--learning_rate_schedule=linear').code == 0
  for steps, said in ((1, '1 steps already: --overwrite'),
                      (3, 'trained with --max_steps=1, not 3')):
    run = train('--max_steps=%d' % steps, '--learning_rate_schedule=linear')
    assert said in run.stdout + run.stderr
  assert train('--max_steps=3', '--learning_rate_schedule=staircase').code == 0
  assert newest_step(tmp_path / 'run') == 3


# Going on.


def test_run_with_more_steps_goes_on_from_what_was_saved(train, run_dir):
  (run_dir / 'notes.txt').write_text('mine')
  before = contents(run_dir)
  run = train('--max_steps=13', '--learning_rate=0')
  assert (run.code, run.stderr) == (0, '')
  assert 'Continuing from %s' % (run_dir / 'model.ckpt-11') in run.stdout
  assert printed_steps(run.stdout) == [11, 12]
  for name in ('conv1/weights', 'local4/biases'):
    old, new = (tf.train.load_variable(
        str(run_dir / ('model.ckpt-%d' % step)), name) for step in (11, 13))
    np.testing.assert_array_equal(old, new)
  after = contents(run_dir)
  assert set(before) < set(after)
  assert all(after[name] == before[name] for name in before
             if name.startswith(('notes', 'events', 'model.ckpt-0.')))


@pytest.mark.parametrize('max_steps', [11, 5])
def test_run_that_has_its_steps_says_so_and_changes_nothing(
    train, run_dir, max_steps):
  before = contents(run_dir)
  run = train('--max_steps=%d' % max_steps)
  assert (run.code, run.stderr, printed_steps(run.stdout)) == (0, '', [])
  assert 'trained for 11 steps already' in run.stdout
  assert contents(run_dir) == before


def test_overwrite_starts_anew_and_removes_only_what_the_suite_wrote(
    train, run_dir):
  foreign = ('notes.txt', 'checkpoint.bak', 'my_model.ckpt-3.index',
             'model.ckpt-best.index', 'sub/model.ckpt-11.index')
  (run_dir / 'sub').mkdir()
  for name in foreign + ('events.out.tfevents.1.elsewhere',):
    (run_dir / name).write_text(name)
  run = train('--overwrite', '--max_steps=2')
  assert (run.code, printed_steps(run.stdout)) == (0, [0, 1])
  found = contents(run_dir)
  assert all(found[name] == name.encode() for name in foreign)
  assert not any(name.startswith('model.ckpt-11.') for name in found)
  assert 'events.out.tfevents.1.elsewhere' not in found


def test_train_dir_may_be_relative_of_the_home_folder_and_moved(
    train, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path))
  for step, folder in enumerate(['run', '~/run', 'moved']):
    if folder == 'moved':
      (tmp_path / 'run').rename(tmp_path / 'moved')
    run = train('--train_dir=' + folder, '--max_steps=%d' % (step + 1))
    assert (run.code, run.stderr, printed_steps(run.stdout)) == (0, '', [step])
  assert os.listdir(tmp_path) == ['moved']


@pytest.mark.parametrize('named', [
    '{}/other/model.ckpt-11', '../other/model.ckpt-11', None])
def test_checkpoints_of_another_run_are_left_alone(
    train, run_dir, tmp_path, named):
  other = run_dir.rename(tmp_path / 'other')
  run_dir.mkdir()
  state = b'\xff\x00garbled' if named is None else (
      'model_checkpoint_path: "{0}"\nall_model_checkpoint_paths: "{0}"\n'
      .format(named.format(tmp_path)).encode())
  (run_dir / 'checkpoint').write_bytes(state)
  before = contents(other)
  run = train('--max_steps=2', '--max_to_keep=1')
  assert (run.code, run.stderr, printed_steps(run.stdout)) == (0, '', [0, 1])
  assert list(cifar10_train.checkpoints(str(run_dir))) == [2]
  assert contents(other) == before


@pytest.mark.parametrize('weights, complaint', [
    (np.zeros([3, 3, 3, 32], np.float32),
     'conv1/weights is [3, 3, 3, 32] there and [5, 5, 3, 64] here'),
    (np.zeros([5, 5, 3, 64]), 'is float64 there and float32 here')])
def test_checkpoint_of_another_network_is_refused_in_one_line(
    train, tmp_path, weights, complaint):
  (tmp_path / 'run').mkdir()
  with tf.Graph().as_default(), tf.Session() as session:
    tf.train.get_or_create_global_step()
    tf.get_variable('conv1/weights', initializer=weights)
    session.run(tf.global_variables_initializer())
    tf.train.Saver().save(session, str(tmp_path / 'run' / 'model.ckpt'), 3)
  before = contents(tmp_path / 'run')
  assert is_one_line(train('--max_steps=9'), complaint)
  assert contents(tmp_path / 'run') == before


def test_step_is_what_the_name_of_a_checkpoint_says(train, evaluate, run_dir):
  (run_dir / 'run.json').unlink()
  reader = tf.train.load_checkpoint(str(run_dir / 'model.ckpt-11'))
  for dtype in None, np.float32:  # The original's multi-GPU script has float32.
    with tf.Graph().as_default(), tf.Session() as session:
      for name in reader.get_variable_to_shape_map():
        if name != 'global_step':
          tf.get_variable(name, initializer=reader.get_tensor(name))
      if dtype:
        tf.get_variable('global_step', initializer=dtype(3))
      session.run(tf.global_variables_initializer())
      tf.train.Saver().save(session, str(run_dir / 'model.ckpt'), 20)
    run = evaluate('--run_once', '--num_examples=8')
    assert 'correct at step 20\n' in run.stdout
  run = train('--max_steps=22')
  assert (run.code, printed_steps(run.stdout)) == (0, [20, 21])
  assert '%s has no run.json' % run_dir in run.stdout


# Programs that use it.


def _run_file(path, monkeypatch, *flags):
  """Runs a script as a notebook's %run does. Returns its exit code."""
  monkeypatch.setattr(sys, 'argv', [str(path), *flags])
  with tf.Graph().as_default(), pytest.raises(SystemExit) as end:
    runpy.run_path(str(path), run_name='__main__')
  return end.value.code or 0


def test_renamed_script_that_runs_again_in_a_process_has_its_own_flags_only(
    tiny_flags, tmp_path, monkeypatch, capfd):
  path = shutil.copy(ROOT / 'cifar10_train.py', tmp_path / 'my_train.py')
  flags = [*tiny_flags, '--train_dir=%s' % (tmp_path / 'run'), '--max_steps=1']
  assert _run_file(path, monkeypatch, *flags, '--recipe=fast', '--seed=1',
                   '--batch_size=251') == 1
  assert _run_file(path, monkeypatch, *flags) == 0
  run = cifar10_train.read_run(str(tmp_path / 'run'))
  given = {'classes': TINY.classes, 'max_steps': 1, 'batch_size': 8,
           **{name: run[name] for name in (
               'dataset', 'data_dir', 'train_dir', 'started')}}
  assert run == {**DEFAULTS[cifar10_train], 'help': False, **given}
  capfd.readouterr()
  assert _run_file(path, monkeypatch, '--help') == 0
  assert _listed_flags(capfd.readouterr().out) == {
      *DEFAULTS[cifar10_train], 'help'}
  assert _run_file(path, monkeypatch, '--num_gpus=2') == 2
  assert capfd.readouterr().err.startswith('my_train.py: ')
  assert _run_file(ROOT / 'cifar10_eval.py', monkeypatch, '--seed=1') == 2


def test_train_works_in_any_thread_and_gives_signal_handlers_back(
    tiny_flags, tmp_path):
  handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
  flags = [*tiny_flags, '--train_dir=%s' % (tmp_path / 'run')]
  parse_flags(cifar10_train, *flags, '--max_steps=1')
  codes = [cifar10_train.train()]
  parse_flags(cifar10_train, *flags, '--max_steps=2')
  thread = threading.Thread(target=lambda: codes.append(cifar10_train.train()))
  thread.start()
  thread.join()
  assert codes == [0, 0] and newest_step(tmp_path / 'run') == 2
  assert handlers == [
      signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]


def test_arguments_of_a_notebook_kernel_are_not_for_us(monkeypatch):
  monkeypatch.setattr(
      sys, 'argv', ['/lib/ipykernel_launcher.py', '-f', 'kernel.json'])
  importlib.reload(cifar10)
  assert sys.argv == ['/lib/ipykernel_launcher.py']


# Folders that are URLs.


@pytest.mark.parametrize('scheme', ['ram', 'file'])
def test_folders_behind_a_url_do_what_local_ones_do(
    train, evaluate, tmp_path, scheme):
  url = '%s://%s' % (scheme, tmp_path)
  flags = '--checkpoint_dir=%s/run' % url, '--eval_dir=%s/eval' % url
  for step in range(2):
    run = train('--train_dir=%s/run' % url, '--max_steps=%d' % (step + 1))
    assert (run.code, run.stderr, printed_steps(run.stdout)) == (0, '', [step])
  assert cifar10_train.read_run(url + '/run')['max_steps'] == 2
  run = evaluate(*flags)
  assert (run.code, run.stderr) == (0, '')
  assert '70 correct at step 2\n' in run.stdout
  assert evaluate(*flags, '--export_dir=%s/model' % url).code == 0
  assert tf.io.gfile.exists(url + '/model/saved_model.pb')
  run = train('--train_dir=%s/run' % url, '--max_steps=1', '--overwrite')
  assert printed_steps(run.stdout) == [0]
  assert list(cifar10_train.checkpoints(url + '/run')) == [0, 1]
  local = ['eval', 'model', 'run'] if scheme == 'file' else []
  assert sorted(os.listdir(tmp_path)) == local


@pytest.mark.parametrize('script, name', [
    (cifar10_train, 'train_dir'), (cifar10_eval, 'checkpoint_dir'),
    (cifar10_eval, 'eval_dir'), (cifar10_eval, 'export_dir')])
def test_unknown_kind_of_url_is_explained_in_one_line(
    call_script, tmp_path, monkeypatch, script, name):
  monkeypatch.chdir(tmp_path)
  assert _is_refused(
      call_script(script, '--%s=nosuch://x' % name), name, 'nosuch://')
  assert os.listdir(tmp_path) == []


def test_bucket_out_of_reach_is_explained_in_one_line(train, monkeypatch):
  for name in ('https_proxy', 'http_proxy'):
    monkeypatch.setenv(name, 'http://nowhere.invalid:1')
  assert is_one_line(
      train('--train_dir=gs://bucket/run'), '--train_dir=gs://bucket/run')


# Clusters are what the other trainer is for.


@pytest.mark.parametrize('jobs, task, complaint', [
    (['chief', 'ps'], 'chief', 'cifar10_multi_gpu_train.py'),
    (['worker', 'ps'], 'ps', 'cifar10_multi_gpu_train.py'),
    (['chief', 'evaluator'], 'evaluator', 'cifar10_eval.py'),
    ([], 'garbled', 'TF_CONFIG cannot be read'),
    (['chief'], 'chief', None), (['worker', 'evaluator'], 'worker', None)])
def test_only_a_cluster_of_one_task_that_computes_trains(
    train, monkeypatch, jobs, task, complaint):
  monkeypatch.setattr(os, '_exit', sys.exit)
  config = {'cluster': {job: ['host:1'] for job in jobs},
            'task': {'type': task, 'index': 0}}
  monkeypatch.setenv('TF_CONFIG', json.dumps(config)[task == 'garbled':])
  run = train('--max_steps=1')
  if complaint:
    assert is_one_line(run, complaint)
  else:
    assert (run.code, printed_steps(run.stdout)) == (0, [0])


# Flags, of all scripts.

OF_ALL = {
    'batch_size': 128, 'data_dir': '/tmp/cifar10_data', 'use_fp16': False,
    'dataset': 'cifar10', 'model': 'default', 'image_size': 24,
    'data_url': None, 'use_bfloat16': False}
OF_TRAINING = {
    'train_dir': '/tmp/cifar10_train', 'overwrite': False, 'max_steps': 100000,
    'log_frequency': 10, 'log_device_placement': False, 'max_to_keep': 5,
    'save_checkpoint_secs': 600, 'save_summary_steps': 100, 'seed': None,
    'recipe': 'original', 'learning_rate': 0.1, 'weight_decay': 0.004,
    'learning_rate_schedule': 'staircase', 'momentum': 0.0,
    'optimizer': 'descent', 'label_smoothing': 0.0, 'crop_margin': 0,
    'moving_average_decay': 0.9999, 'min_fraction_of_examples_in_queue': 0.4,
    'deterministic': False}
OF_TOWERS = {'num_gpus': 1, 'sync_replicas': True}
OF_EVALUATION = {
    'eval_dir': None, 'checkpoint_dir': '/tmp/cifar10_train',
    'eval_data': 'test', 'eval_interval_secs': 300, 'num_examples': 10000,
    'run_once': False, 'use_moving_average': True, 'multiview': False,
    'predictions_csv': None, 'predict': None, 'export_dir': None}
DEFAULTS = dict(zip(SCRIPTS, (
    {**OF_ALL, **OF_TRAINING}, {**OF_ALL, **OF_TRAINING, **OF_TOWERS},
    {**OF_ALL, **OF_EVALUATION})))


def _is_refused(run, *parts):
  return (run.code == 2 and run.stdout == '' and run.stderr.count('\n') == 1
          and run.stderr.startswith('script.py: ')
          and all(part in run.stderr for part in parts))


@pytest.mark.parametrize('script', SCRIPTS)
def test_script_has_its_own_flags_and_refuses_those_of_others(
    call_script, monkeypatch, script):
  for name in {*OF_TRAINING, *OF_TOWERS, *OF_EVALUATION} - {*DEFAULTS[script]}:
    assert _is_refused(call_script(script, '--%s=1' % name), name)
  monkeypatch.setitem(sys.modules, '__main__', script)
  run = call_script(script, '--help')
  assert (run.code, run.stderr) == (0, '')
  assert 'python %s.py' % script.__name__ in run.stdout
  assert _listed_flags(run.stdout) == {*DEFAULTS[script], 'help'}
  parse_flags(script)
  assert {name: FLAGS[name].default for name in DEFAULTS[script]} == (
      DEFAULTS[script])


def _listed_flags(help):
  return set(re.findall(r'^  (?:-\w,)?--(?:\[no\])?(\w+):', help, re.M))


@pytest.mark.parametrize('script, name', [
    *((cifar10_multi_gpu_train, name) for name in (
        'batch_size', 'max_steps', 'log_frequency', 'save_checkpoint_secs',
        'save_summary_steps', 'num_gpus')), (cifar10_eval, 'num_examples')])
def test_number_has_to_be_whole_and_positive(call_script, script, name):
  for value in ('0', '-1', 'x', '1.5', ''):
    assert _is_refused(
        call_script(script, '--%s=%s' % (name, value)), name, value)


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_number_has_a_bound_that_tensorflow_can_carry(
    call_script, script):
  parse_flags(script)
  kinds = {name: FLAGS[name].parser for name in DEFAULTS[script]}
  for kind, values in ((tf.flags.IntegerParser, [2 ** 31, 10 ** 30]), (
      tf.flags.FloatParser, ['nan', '-inf', 'Infinity', '1e999'])):
    names = [name for name in kinds if isinstance(kinds[name], kind)]
    assert names or script is cifar10_eval
    for name, value in itertools.product(names, values):
      assert _is_refused(
          call_script(script, '--%s=%s' % (name, value)), name, str(value))


@pytest.mark.parametrize('flags, parts', [
    ('--seed=x', ['seed', 'x']), ('--use_fp16=maybe', ['use_fp16', 'maybe']),
    ('--dataset=mnist', ['dataset', 'cifar10, cifar100, cifar100_coarse']),
    ('--train_dir=/tmp/[1]', ['train_dir', '[ ]']),
    ('--train_dir=', ['train_dir', 'neither a folder']),
    ('--use_fp16 --use_bfloat16', ['use_fp16', 'use_bfloat16']),
    ('--deterministic', ['--seed']), ('--nooverwrite=3', ['overwrite']),
    ('--nonsense=1', ['nonsense']), ('stray', ['stray']),
    ('--data_dir', ['data_dir']), ('--train_dir=/tmp/\udcff', ['not UTF-8']),
    *(('--' + name, [name]) for name in (  # Of absl, which starts no script.
        'only_check_args', 'pdb', 'helpfull', 'helpshort', 'version'))])
def test_flags_that_make_no_sense_are_explained_in_one_line(
    call_script, flags, parts):
  assert _is_refused(call_script(cifar10_train, *flags.split()), *parts)


def test_batch_larger_than_the_data_set_is_explained_in_one_line(train):
  assert is_one_line(train('--batch_size=251'), '--batch_size')

"""cifar10_train.py: what a run prints, leaves and continues from; flags."""
import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import sys
import time

import numpy as np
import pytest

import cifar10
import cifar10_eval
import cifar10_multi_gpu_train
import cifar10_train
from conftest import (
    FLAGS, SCRIPTS, STEP_LINE, TINY, contents, events, finish,
    is_one_line, newest_step, parse_flags, printed_steps, tf)

LAYERS = ('conv1', 'conv2', 'local3', 'local4', 'softmax_linear')


# A run.


def test_run_prints_the_lines_that_people_parse(trained):
  assert (trained.code, trained.stderr) == (0, '')
  where, filling, *lines, done = trained.stdout.splitlines()
  assert re.fullmatch(r'Training on the CPU, \d+ cores\.|Training on GPU:0 .*',
                      where)
  assert filling.startswith(
      'Filling queue with 4000 synthetic images before starting to train.')
  parsed = [STEP_LINE.fullmatch(line) for line in lines]
  assert [int(match[1]) for match in parsed] == [0, 5, 10]
  assert float(parsed[0][2]) == pytest.approx(4.68, abs=0.1)
  assert re.fullmatch(
      r'Trained up to step 11 in 0:\d\d:\d\d\. .*python cifar10_eval.py '
      f'--run_once --checkpoint_dir={trained.train_dir}', done)


@pytest.mark.parametrize('dtype, flags, warning', [
    ('bfloat16', 'avx2 fma', 'This processor computes bfloat16'),
    ('bfloat16', 'avx2 avx512_bf16', None),
    ('float16', 'avx2 avx512_bf16', 'This processor computes float16'),
    ('float32', 'avx2', None)])
def test_device_is_named_with_what_makes_it_slow(
    monkeypatch, tmp_path, capsys, caplog, dtype, flags, warning):
  monkeypatch.setattr(cifar10_train, '_PROC', str(tmp_path))
  monkeypatch.setattr(tf.config, 'list_physical_devices', lambda kind: [])
  (tmp_path / 'cpuinfo').write_text(f'flags : {flags}\n')
  cifar10_train.say_where('Evaluating', dtype)
  assert capsys.readouterr().out.startswith('Evaluating on the CPU, ')
  assert [record.getMessage()[:len(warning)] for record in caplog.records
          ] == [warning] if warning else not caplog.records
  (tmp_path / 'driver' / 'nvidia').mkdir(parents=True)
  (tmp_path / 'driver' / 'nvidia' / 'version').write_text('')
  cifar10_train.say_where('Evaluating', 'float32')
  assert 'tensorflow[and-cuda]' in caplog.records[-1].getMessage()


def test_run_leaves_a_checkpoint_that_the_original_can_load(trained):
  checkpoint = tf.train.latest_checkpoint(str(trained.train_dir))
  assert os.path.basename(checkpoint) == 'model.ckpt-11'
  names = {name for name, _ in tf.train.list_variables(checkpoint)}
  assert {name for name in names if not name.endswith('/avg')} == {
      'global_step', *(f'{layer}/{kind}{average}' for layer in LAYERS
                       for kind in ('weights', 'biases')
                       for average in ('', '/ExponentialMovingAverage'))}
  step = tf.train.load_variable(checkpoint, 'global_step')
  assert step == 11 and step.dtype == np.int64


def test_event_file_holds_summaries_speed_and_graph(trained):
  found = events(trained.train_dir)
  tags = [tag for step, tag, _ in found if step == 6]
  assert len(set(tags)) == len(tags)
  fullness = {tag for _, tag, _ in found if 'full' in tag}
  assert any('shuffle' in tag for tag in fullness)
  assert {tag for _, tag, _ in found} - fullness == {
      *(f'images/image/{i}' for i in range(3)), 'learning_rate',
      'speed/examples per sec', 'speed/sec per batch', 'Precision @ 1',
      *(f'{layer}/{kind}' for layer in LAYERS for kind in (
          'activations', 'sparsity', 'weights', 'weights/gradients', 'biases',
          'biases/gradients')),
      *(loss + kind for loss in (
          'cross_entropy', 'local3/weight_loss', 'local4/weight_loss',
          'total_loss') for kind in ('', ' (raw)'))}
  assert {step for step, *_ in found} == {1, 6, 11}
  path, = trained.train_dir.glob('events.out.*')
  graph = next(event.graph_def for event in tf.train.summary_iterator(str(path))
               if event.HasField('graph_def'))
  assert {node.name.split('/')[0] for node in tf.GraphDef.FromString(
      graph).node} >= {'input', 'train', *LAYERS}


def test_speed_is_the_mean_over_the_steps_since_the_last_line(
    monkeypatch, capsys):
  parse_flags(cifar10_train, '--log_frequency=5')
  now = [1000.0]
  monkeypatch.setattr(cifar10_train.time, 'monotonic', lambda: now[0])
  global_step = tf.train.get_or_create_global_step()
  step = tf.assign_add(global_step, 1)
  with tf.control_dependencies([global_step.initializer]):
    initial = tf.assign(global_step, 7)
  hook = cifar10_train.LoggerHook(
      tf.constant(1.5), step, cifar10.Recipe(batch_size=8), 2, writer=None)
  with tf.train.MonitoredSession(
      tf.train.ChiefSessionCreator(tf.train.Scaffold(init_op=initial)),
      [hook]) as session:
    for i in range(21):
      now[0] += 2.0 if i else 0.5
      session.run(step)
  assert [
      STEP_LINE.sub(r'\1: \3; \4', line)
      for line in capsys.readouterr().out.splitlines()] == [
          '10: 9.8; 1.625', '15: 8.0; 2.000',
          '99984 steps (32.0 epochs) left, about 2 days, 7:32:48.',
          '20: 8.0; 2.000',
          '25: 8.0; 2.000']


@pytest.mark.parametrize('flags', [
    ['--save_summary_steps=1'], ['--max_steps=1', '--max_to_keep=1']])
def test_loss_that_is_not_finite_is_one_line(train, tmp_path, flags):
  run = train('--max_steps=10', '--learning_rate=1e30', *flags)
  assert is_one_line(run, 'the loss after 1 steps is nan',
                     'lower --learning_rate (now 1e+30)')
  assert cifar10_train.latest_checkpoint(str(tmp_path / 'run')).endswith('-0')


def test_checkpoints_need_no_clock_and_come_down_to_max_to_keep(
    train, run_dir, monkeypatch):
  for suffix in 'index', 'meta', 'data-00000-of-00001':
    for step in 1, 2, 3:
      shutil.copy(run_dir / f'model.ckpt-0.{suffix}',
                  run_dir / f'model.ckpt-{step}.{suffix}')
  seconds, days, now = itertools.count(), itertools.count(), time.time()
  monkeypatch.setattr(cifar10_train.time, 'monotonic', seconds.__next__)
  monkeypatch.setattr(
      cifar10_train.time, 'time', lambda: now - 86400 * next(days))
  assert train('--max_steps=20', '--max_to_keep=3',
               '--save_checkpoint_secs=4').code == 0
  *_, before_last, last = steps = list(cifar10_train.checkpoints(str(run_dir)))
  assert len(steps) == 3 and last == 20 and 11 < before_last < 20


def test_seed_repeats_the_initial_weights(train, tmp_path):
  weights = []
  for name, seed in ('one', 7), ('two', 7), ('other', 8):
    train(f'--train_dir={tmp_path / name}', f'--seed={seed}', '--max_steps=1')
    weights.append(tf.train.load_variable(
        str(tmp_path / name / 'model.ckpt-0'), 'conv1/weights'))
  assert (weights[0] == weights[1]).all() and (weights[0] != weights[2]).any()


def test_deterministic_runs_end_with_the_same_bytes(
    start_script, synthetic_dir, tmp_path):
  # Determinism cannot be switched off again, so these are real processes.
  runs = [start_script(
      'cifar10_train', '--dataset=synthetic', f'--data_dir={synthetic_dir}',
      f'--train_dir={tmp_path / name}', '--max_steps=6', '--batch_size=16',
      '--seed=5', '--deterministic', '--recipe=fast') for name in 'ab']
  assert [finish(run).code for run in runs] == [0, 0]
  one, two = (contents(tmp_path / name)['model.ckpt-6.data-00000-of-00001']
              for name in 'ab')
  assert one == two


# Continuing, and what may change then.


def test_run_file_is_the_run_as_a_dictionary(train, tiny_dir, tmp_path):
  train('--recipe=strong', '--max_steps=2', '--learning_rate=0.01')
  recipe = dataclasses.replace(
      cifar10.RECIPES['strong'], max_steps=2, learning_rate=0.01, batch_size=8,
      examples_per_epoch=250)
  written = json.loads((tmp_path / 'run' / 'run.json').read_text())
  assert written == {
      'dataset': 'synthetic', 'data_dir': str(tiny_dir),
      'classes': list(TINY.classes), 'recipe': dataclasses.asdict(recipe)}
  assert cifar10_train.read_run(str(tmp_path / 'run')).recipe == recipe


def test_fast_recipe_spelled_out_by_flags_continues(train, tmp_path):
  assert train('--recipe=fast', '--max_steps=2').code == 0
  flags = [f'--{field.name}={getattr(cifar10.RECIPES["fast"], field.name)}'
           for field in dataclasses.fields(cifar10.Recipe) if field.metadata]
  # The rate falls to zero at --max_steps, so it may not change.
  run = train(*flags, '--max_steps=2')
  assert (run.code, run.stderr) == (0, '')
  run = train('--recipe=fast', '--learning_rate=0.1', '--max_steps=2')
  assert '--learning_rate is 0.1 now, was 0.02' in run.stdout
  assert is_one_line(train('--recipe=fast', '--max_steps=3'),
                     '--max_steps=2, not 3')
  assert newest_step(tmp_path / 'run') == 2


@pytest.mark.parametrize('flags, parts', [
    ('--recipe=fast', ['--image_size=24', '28']),
    ('--model=local', ['--model=default', 'local']),
    ('--optimizer=muon', ['--optimizer=sgd', 'muon']),
    ('--momentum=0.9', ['--momentum=0.0', '0.9']),
    ('--label_smoothing=0.1', ['--label_smoothing=0.0', '0.1']),
    ('--dataset=cifar10', ['--dataset=synthetic', 'cifar10'])])
def test_run_of_another_network_is_refused_before_a_download(
    train, run_dir, tmp_path, flags, parts):
  before = contents(run_dir)
  run = train(f'--data_dir={tmp_path / "data"}', flags)
  assert is_one_line(run, run_dir, *parts)
  assert contents(run_dir) == before and not (tmp_path / 'data').exists()


def test_other_differences_are_a_line_each_and_it_continues(train, run_dir):
  run = train('--max_steps=12', '--batch_size=16', '--crop_margin=2')
  assert (run.code, run.stderr, printed_steps(run.stdout)) == (0, '', [11])
  for line in ('--max_steps is 12 now, was 11', '--crop_margin is 2 now, was 0',
               '--batch_size is 16 now, was 8'):
    assert line in run.stdout
  assert run.stdout.count(' now, was ') == 3


@pytest.mark.parametrize('text', ['', '[]', '{"flags": {"max_steps": 5}}'])
def test_run_file_that_cannot_be_used_is_named_and_not_needed(
    train, evaluate, run_dir, text):
  (run_dir / 'run.json').write_text(text)
  for run in train('--max_steps=12'), evaluate('--run_once'):
    assert is_one_line(run, run_dir / 'run.json')
  (run_dir / 'run.json').unlink()  # The original writes none.
  assert printed_steps(train('--max_steps=12').stdout) == [11]


def test_run_with_more_steps_continues_from_its_checkpoint(train, run_dir):
  before = contents(run_dir)
  run = train('--max_steps=13', '--learning_rate=0')
  assert (run.code, run.stderr) == (0, '')
  assert printed_steps(run.stdout) == [11, 12]
  assert f'Continuing from {run_dir / "model.ckpt-11"}' in run.stdout
  old, new = (tf.train.load_variable(
      str(run_dir / f'model.ckpt-{i}'), 'conv1/weights') for i in (11, 13))
  np.testing.assert_array_equal(old, new)
  after = contents(run_dir)
  assert all(after[name] == before[name] for name in before
             if name.startswith(('events', 'model.ckpt-0.')))


@pytest.mark.parametrize('max_steps', [11, 5])
def test_run_that_has_its_steps_changes_nothing(train, run_dir, max_steps):
  before = contents(run_dir)
  run = train(f'--max_steps={max_steps}')
  assert (run.code, run.stderr, printed_steps(run.stdout)) == (0, '', [])
  assert '--overwrite' in run.stdout
  assert contents(run_dir) == before


def test_overwrite_starts_again_and_leaves_other_files_alone(
    train, run_dir, tmp_path):
  foreign = ('events.out.txt', 'my_model.ckpt-3.index', 'model.ckpt-best.index',
             'model.ckpt-11.tar')
  for name in (*foreign, 'events.out.tfevents.1.earlier'):
    (run_dir / name).write_text(name)
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'events.out.tfevents.2.other').write_text('')
  (run_dir / 'eval').symlink_to(tmp_path / 'other')
  run = train('--overwrite', '--max_steps=2')
  assert (run.code, printed_steps(run.stdout)) == (0, [0, 1])
  names = set(os.listdir(run_dir))
  assert names > {*foreign, 'model.ckpt-2.index'}
  assert not names & {'model.ckpt-11.index', 'events.out.tfevents.1.earlier'}
  assert os.listdir(run_dir / 'eval') == ['events.out.tfevents.2.other']


def test_train_dir_may_be_relative_in_the_home_folder_and_moved(
    train, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path))
  for step, folder in enumerate(['run', '~/run', 'moved']):
    if folder == 'moved':
      (tmp_path / 'run').rename(tmp_path / 'moved')
    run = train(f'--train_dir={folder}', f'--max_steps={step + 1}')
    assert (run.code, run.stderr, printed_steps(run.stdout)) == (0, '', [step])
  assert os.listdir(tmp_path) == ['moved']


def test_folders_behind_a_url_do_what_local_ones_do(
    train, evaluate, tmp_path):
  url = f'ram://{tmp_path}'
  flags = f'--checkpoint_dir={url}/run', f'--eval_dir={url}/eval'
  for step in range(2):
    run = train(f'--train_dir={url}/run', f'--max_steps={step + 1}')
    assert (run.code, run.stderr, printed_steps(run.stdout)) == (0, '', [step])
  assert cifar10_train.read_run(f'{url}/run').recipe.max_steps == 2
  run = evaluate(*flags)
  assert (run.code, run.stderr) == (0, '')
  assert '70 correct at step 2\n' in run.stdout
  assert evaluate(*flags, f'--export_dir={url}/model').code == 0
  assert tf.io.gfile.exists(f'{url}/model/saved_model.pb')
  run = train(f'--train_dir={url}/run', '--max_steps=1', '--overwrite')
  assert printed_steps(run.stdout) == [0]
  assert list(cifar10_train.checkpoints(f'{url}/run')) == [0, 1]
  assert os.listdir(tmp_path) == []


# Flags, of all scripts.

OF_ALL = {
    'batch_size': 128, 'data_dir': '/tmp/cifar10_data', 'use_fp16': False,
    'dataset': 'cifar10', 'data_url': None}
OF_RECIPES = {
    'max_steps': 100000, 'image_size': 24, 'model': 'default',
    'learning_rate': 0.1, 'learning_rate_schedule': 'staircase',
    'momentum': 0.0, 'optimizer': 'sgd', 'label_smoothing': 0.0,
    'weight_decay': 0.004, 'crop_margin': 0, 'moving_average_decay': 0.9999}
OF_TRAINING = {
    **OF_ALL, **OF_RECIPES, 'train_dir': '/tmp/cifar10_train',
    'overwrite': False, 'log_frequency': 10, 'log_device_placement': False,
    'max_to_keep': 5, 'save_checkpoint_secs': 600, 'save_summary_steps': 100,
    'seed': None, 'deterministic': False, 'recipe': 'original',
    'use_bfloat16': False, 'min_fraction_of_examples_in_queue': 0.4}
DEFAULTS = {
    cifar10_train: OF_TRAINING,
    cifar10_multi_gpu_train: {
        **OF_TRAINING, 'num_gpus': 1, 'sync_replicas': True},
    cifar10_eval: {
        **OF_ALL, 'checkpoint_dir': '/tmp/cifar10_train', 'eval_dir': None,
        'eval_data': 'test', 'eval_interval_secs': 300, 'num_examples': None,
        'run_once': False, 'use_moving_average': True, 'multiview': False,
        'predictions_csv': None, 'predict': None, 'export_dir': None}}


def test_recipe_field_with_a_help_text_is_a_flag_with_bounds():
  parse_flags(cifar10_train)
  fields = [field for field in dataclasses.fields(cifar10.Recipe)
            if field.metadata]
  assert {field.name for field in fields} == {*OF_RECIPES}
  for field in fields:
    assert field.metadata['help'] in FLAGS[field.name].help
    wrong = 'x' if field.type is str else field.metadata['lower_bound'] - 1
    with pytest.raises(tf.flags.Error, match=f'--{field.name}={wrong}'):
      FLAGS(['script.py', f'--{field.name}={wrong}'])


@pytest.mark.parametrize('script', SCRIPTS)
def test_script_shows_its_own_flags_and_refuses_those_of_others(
    call_script, script):
  expected = DEFAULTS[script]
  for name in set().union(*DEFAULTS.values()) - {*expected}:
    assert is_one_line(call_script(script, f'--{name}=1'), name)
  parse_flags(script)
  assert {name: FLAGS[name].default for name in expected} == expected
  shown = FLAGS.get_key_flags_for_module(script.__name__)
  assert {flag.name for flag in shown} == {*expected}  # By --help.


@pytest.mark.parametrize('script, flags, parts', [
    *((script, f'--{name}={value}', [name, value]) for script, name in [
        (cifar10_train, 'batch_size'), (cifar10_multi_gpu_train, 'num_gpus'),
        (cifar10_eval, 'num_examples')] for value in ('0', 'x', '1.5')),
    (cifar10_train, '--use_fp16=maybe', ['use_fp16', 'maybe']),
    (cifar10_train, '--recipe=slow', ['recipe', 'slow']),
    (cifar10_train, '--dataset=mnist', ['mnist', 'cifar10, cifar10_holdout']),
    (cifar10_train, '--use_fp16 --use_bfloat16', ['use_fp16', 'use_bfloat16']),
    (cifar10_train, '--train_dir=/dev/null', ['/dev/null']),
    (cifar10_train, '--train_dir=nosuch://x', ['nosuch://x']),
    (cifar10_train, '--nonsense=1', ['nonsense']),
    (cifar10_train, 'stray', ['stray']),
    (cifar10_train, '--data_dir', ['data_dir'])])
def test_wrong_flags_are_one_line(call_script, tmp_path, script, flags, parts):
  folder = 'checkpoint_dir' if script is cifar10_eval else 'train_dir'
  run = call_script(script, f'--{folder}={tmp_path}', *flags.split())
  assert is_one_line(run, *parts) and run.stdout == ''


def test_batch_larger_than_the_data_set_is_one_line(train):
  assert is_one_line(train('--batch_size=251'), '--batch_size', '250')


@pytest.mark.parametrize('call', [
    lambda main: main(), lambda main: main(sys.argv), tf.app.run],
                         ids=['no argv', 'argv', 'tf.app.run'])
def test_mains_called_from_a_script_obey_the_command_line(
    tiny_flags, tmp_path, monkeypatch, capsys, call):
  tf.flags.DEFINE_string('mine', '', 'A flag of the reader.')
  for script, folder, flag, said in (
      (cifar10_train, 'train_dir', '--max_steps=1', 'step 0, loss ='),
      (cifar10_eval, 'checkpoint_dir', '--run_once', '70 correct at step 1')):
    flags = [*tiny_flags, f'--{folder}={tmp_path / "run"}', flag, '--mine=x']
    monkeypatch.setattr(sys, 'argv', ['reader.py', *flags])
    with tf.Graph().as_default(), contextlib.suppress(SystemExit):
      call(script.main)
    assert said in capsys.readouterr().out and FLAGS.mine == 'x'

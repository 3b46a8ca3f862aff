"""What the tutorial leaves as exercises, and what its readers asked for."""
import csv
import dataclasses
import json
import os
import sys

import numpy as np
import pytest

import cifar10
import cifar10_eval
import cifar10_input
import cifar10_multi_gpu_train
import cifar10_train
from cifar10_input import CIFAR100, CIFAR100_COARSE, SVHN, UserError, tf

FLAGS = tf.flags.FLAGS


@pytest.fixture
def run_dir(use_tiny, call_script, tmp_path, request):
  """A train_dir of three steps on the tiny data set, perhaps of another size.

  Only its run.json tells evaluation of the size.
  """
  folder = tmp_path / 'run'
  size = getattr(request, 'param', cifar10.IMAGE_SIZE)
  assert call_script(
      cifar10_train.main, '--train_dir=%s' % folder, '--max_steps=3',
      '--learning_rate=0.01', '--image_size=%d' % size).code == 0
  FLAGS['image_size'].unparse()
  return folder


def _evaluate(call_script, run_dir, tmp_path, *flags):
  return call_script(
      cifar10_eval.main, '--checkpoint_dir=%s' % run_dir, '--run_once',
      '--eval_dir=%s' % (tmp_path / 'eval'), *flags)


# The local model.


def test_locally_connected_layer_is_a_convolution_with_weights_of_its_own():
  random = np.random.default_rng(0)
  images = random.standard_normal((2, 4, 5, 3)).astype(np.float32)
  computed = cifar10._locally_connected(
      'local', tf.constant(images), 7, stddev=0.5, decay=None)
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    computed, weights, biases = session.run(
        [computed] + tf.trainable_variables())
  padded = np.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]])
  weights = weights.reshape(4, 5, 27, 7)
  assert biases.shape == (4, 5, 7)
  for y in range(4):
    for x in range(5):
      patches = padded[:, y:y + 3, x:x + 3].reshape(2, 27)
      expected = np.maximum(0, patches @ weights[y, x] + biases[y, x])
      np.testing.assert_allclose(computed[:, y, x], expected, atol=1e-5)


def test_local_model_shares_all_but_its_top_with_the_default(set_flags):
  shapes = {}
  for model in ('default', 'local'):
    set_flags(model=model)
    with tf.Graph().as_default():
      cifar10.inference(tf.zeros([1, 24, 24, 3]))
      shapes[model] = {
          v.op.name: v.shape.as_list() for v in tf.trainable_variables()}
  assert list(shapes['local']) == list(shapes['default'])
  for name, shape in shapes['local'].items():
    assert (shape == shapes['default'][name]) == (
        name.startswith('conv') or name == 'softmax_linear/biases')
  assert shapes['local']['local3/weights'] == [36, 576, 32]
  assert shapes['local']['softmax_linear/weights'] == [1152, 10]


@pytest.mark.parametrize('main, flags', [
    (cifar10_train.main, []),
    (cifar10_multi_gpu_train.main, ['--num_gpus=2'])])
def test_run_of_the_local_model_is_known_to_be_one(
    use_tiny, call_script, tmp_path, main, flags):
  train_dir = tmp_path / 'run'
  run = call_script(
      main, '--train_dir=%s' % train_dir, '--max_steps=2', '--model=local',
      *flags)
  assert run.code == 0
  FLAGS.model = 'default'
  FLAGS['model'].using_default_value = True
  run = _evaluate(call_script, train_dir, tmp_path)
  assert 'correct at step 2\n' in run.stdout
  FLAGS.model = 'default'
  before = sorted(os.listdir(train_dir))
  run = call_script(main, '--train_dir=%s' % train_dir, '--max_steps=4')
  assert run.code == 1
  assert run.stderr.count('\n') == 1
  assert 'trained with --model=local, not default' in run.stderr
  assert sorted(os.listdir(train_dir)) == before


# The recipe.


@pytest.mark.parametrize('schedule, rates', [
    ('staircase', [0.2, 0.2, 0.2]), ('linear', [0.2, 0.1, 0.0]),
    ('cosine', [0.2, 0.1, 0.0])])
def test_learning_rate_follows_its_schedule(set_flags, schedule, rates):
  set_flags(learning_rate=0.2, learning_rate_schedule=schedule, max_steps=100)
  step = tf.placeholder(tf.int64, [])
  optimizer = cifar10.make_optimizer(step, 128)
  with tf.Session() as session:
    found = [session.run(optimizer._learning_rate, {step: value})
             for value in (0, 50, 100)]
  np.testing.assert_allclose(found, rates, atol=1e-6)


def test_momentum_is_that_of_nesterov(set_flags):
  set_flags(learning_rate=0.1, momentum=0.9)
  variable = tf.get_variable('v', initializer=1.0)
  step = tf.train.get_or_create_global_step()
  update = cifar10.make_optimizer(step, 128).minimize(2 * variable)
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    session.run(update)
    session.run(update)
    # Velocities of 2 and 3.8, and a look ahead from each.
    assert session.run(variable) == pytest.approx(
        1 - 0.1 * (2 + 0.9 * 2) - 0.1 * (2 + 0.9 * 3.8))


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_weight_decay_is_that_of_the_flag(set_flags, weight_decay):
  set_flags(weight_decay=weight_decay)
  cifar10.inference(tf.zeros([1, 24, 24, 3]))
  weights = [v for v in tf.trainable_variables()
             if v.op.name in ('local3/weights', 'local4/weights')]
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    losses, values = session.run([tf.get_collection('losses'), weights])
  np.testing.assert_allclose(
      losses, [weight_decay * (v ** 2).sum() / 2 for v in values], rtol=1e-4)


@pytest.mark.parametrize('script', [cifar10_train, cifar10_multi_gpu_train])
def test_recipe_sets_what_the_command_line_does_not_say(
    use_tiny, call_script, tmp_path, script):
  recipe = cifar10.RECIPES['strong']
  run = call_script(
      script.main, '--train_dir=%s' % tmp_path, '--recipe=strong',
      '--max_steps=2', '--learning_rate=0.01')
  assert run.code == 0, run.stderr
  flags = json.loads((tmp_path / 'run.json').read_text())['flags']
  assert {name: flags[name] for name in recipe} == {
      **recipe, 'max_steps': 2, 'learning_rate': 0.01, 'batch_size': 8}
  variables = dict(tf.train.list_variables(str(tmp_path / 'model.ckpt-2')))
  assert 'local3/weights/Momentum' in variables
  assert variables['local3/weights'] == [7 * 7 * 64, 384]  # Of 28 pixels.


def test_what_a_program_sets_itself_goes_before_the_recipe():
  FLAGS.recipe = 'fast'
  FLAGS.momentum = 0.5
  cifar10.adopt_recipe()
  assert FLAGS.momentum == 0.5
  assert FLAGS.learning_rate == cifar10.RECIPES['fast']['learning_rate']
  FLAGS.recipe = 'original'
  cifar10.adopt_recipe()
  assert FLAGS.learning_rate == cifar10.INITIAL_LEARNING_RATE
  assert FLAGS.max_steps == 100000


def test_run_of_another_recipe_is_not_continued(run_dir, call_script):
  before = {path: path.read_bytes() for path in run_dir.iterdir()}
  run = call_script(
      cifar10_train.main, '--train_dir=%s' % run_dir, '--recipe=fast')
  assert run.code == 1
  assert run.stderr.count('\n') == 1
  assert 'trained with --recipe=original, not fast' in run.stderr
  assert {path: path.read_bytes() for path in run_dir.iterdir()} == before


def test_rate_that_falls_to_zero_is_not_raised_by_another_number_of_steps(
    use_tiny, call_script, tmp_path):
  def train(*flags):
    return call_script(
        cifar10_train.main, '--train_dir=%s' % tmp_path, *flags)

  assert train('--max_steps=1', '--learning_rate_schedule=linear').code == 0
  for steps, said in ((1, '1 steps already: --overwrite'),
                      (3, 'trained with --max_steps=1, not 3')):
    run = train('--max_steps=%d' % steps, '--learning_rate_schedule=linear')
    assert said in run.stdout + run.stderr
  assert not list(tmp_path.glob('model.ckpt-3.*'))
  assert train('--max_steps=3', '--learning_rate_schedule=staircase').code == 0
  assert list(tmp_path.glob('model.ckpt-3.*'))


def test_run_writes_its_flags_and_versions(run_dir):
  run = json.loads((run_dir / 'run.json').read_text())
  assert run['flags']['learning_rate'] == 0.01
  assert run['flags']['dataset'] == 'synthetic'
  assert run['versions']['tensorflow'] == tf.version.VERSION


def test_seeded_deterministic_runs_end_with_the_same_bytes(
    start_script, finish, synthetic_dir, tmp_path):
  runs = [start_script(
      'cifar10_train', '--dataset=synthetic', '--data_dir=%s' % synthetic_dir,
      '--train_dir=%s' % (tmp_path / name), '--max_steps=10', '--batch_size=16',
      '--seed=%d' % seed, '--deterministic', '--recipe=fast')
          for name, seed in (('one', 5), ('two', 5), ('other', 6))]
  assert [finish(run).code for run in runs] == [0, 0, 0]
  one, two, other = [
      (tmp_path / name / 'model.ckpt-10.data-00000-of-00001').read_bytes()
      for name in ('one', 'two', 'other')]
  assert one == two != other


def test_deterministic_run_needs_a_seed(call_script):
  run = call_script(cifar10_train.main, '--deterministic')
  assert run.code == 2
  assert run.stderr.count('\n') == 1 and '--seed' in run.stderr


@pytest.mark.parametrize('fraction, size', [(0.1, 25), (1.0, 250)])
def test_queue_holds_the_fraction_that_was_asked_for(
    use_tiny, tiny, set_flags, fraction, size):
  set_flags(min_fraction_of_examples_in_queue=fraction)
  cifar10.distorted_inputs(tiny)
  queue, = (op for op in tf.get_default_graph().get_operations()
            if op.type == 'RandomShuffleQueueV2')
  assert queue.get_attr('min_after_dequeue') == size


# Evaluation.


def test_averages_can_be_left_out_of_an_evaluation(
    run_dir, call_script, tmp_path):
  restored = []
  for flag in ('--use_moving_average', '--nouse_moving_average'):
    assert _evaluate(call_script, run_dir, tmp_path, flag).code == 0
    with tf.Graph().as_default():
      cifar10.inference(tf.zeros([1, 24, 24, 3]))
      restored.append(set(cifar10_eval._variables()))
  assert all(name.endswith('/ExponentialMovingAverage') for name in restored[0])
  assert restored[1] == {
      name[:-len('/ExponentialMovingAverage')] for name in restored[0]}


def test_csv_has_a_line_for_each_example(
    run_dir, call_script, tmp_path, tiny, tiny_dir):
  path = tmp_path / 'predictions.csv'
  run = _evaluate(
      call_script, run_dir, tmp_path, '--predictions_csv=%s' % path)
  with open(path) as f:
    header, *rows = csv.reader(f)
  assert header == ['key', 'label', 'prediction'] + list(tiny.classes)
  assert [row[0] for row in rows] == ['test.bin:%d' % i for i in range(70)]
  labels = np.fromfile(tiny_dir / tiny.folder / 'test.bin', np.uint8)[::3073]
  assert [row[1] for row in rows] == [tiny.classes[label] for label in labels]
  probabilities = np.array([row[3:] for row in rows], float)
  np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-4)
  assert '%d/70 correct' % sum(row[1] == row[2] for row in rows) in run.stdout


def test_tensorboard_shows_confusion_and_the_surest_mistakes(
    run_dir, call_script, tmp_path, events):
  _evaluate(call_script, run_dir, tmp_path)
  images = {tag: value.image for _, tag, value in events(tmp_path / 'eval')
            if value.HasField('image')}
  assert (images['confusion/image'].width,
          images['confusion/image'].height) == (160, 160)
  mistakes = [tag for tag in images if tag.startswith('surest_mistakes/')]
  assert len(mistakes) == cifar10_eval.NUM_MISTAKES
  assert all('_taken_for_' in tag for tag in mistakes)


# Prediction and serving.


def _pictures(data_dir, dataset):
  records = np.fromfile(
      data_dir / dataset.folder / 'test.bin', np.uint8).reshape(-1, 3073)
  return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _encode(picture, kind='png'):
  with tf.Graph().as_default(), tf.Session() as session:
    return session.run(getattr(tf.io, 'encode_' + kind)(picture))


@pytest.mark.parametrize('run_dir, multiview', [(24, False), (28, True)],
                         indirect=['run_dir'])
def test_prediction_says_what_evaluation_says(
    run_dir, multiview, call_script, tmp_path, tiny, tiny_dir, set_flags,
    capfd):
  path = tmp_path / 'predictions.csv'
  _evaluate(call_script, run_dir, tmp_path, '--predictions_csv=%s' % path,
            '--multiview=%s' % multiview)
  with open(path) as f:
    rows = list(csv.DictReader(f))[:5]
  paths = [str(tmp_path / ('%d.png' % i)) for i in range(5)]
  for name, picture in zip(paths, _pictures(tiny_dir, tiny)):
    with open(name, 'wb') as f:
      f.write(_encode(picture))
  set_flags(checkpoint_dir=str(run_dir), predict=paths[:1])
  assert cifar10_eval.main(['script'] + paths[1:]) == 0
  lines = [line for line in capfd.readouterr().out.splitlines()
           if line.startswith(str(tmp_path))]
  for name, row, line in zip(paths, rows, lines, strict=True):
    assert line.startswith('%s: %s %.3f, ' % (
        name, row['prediction'], float(row[row['prediction']])))


def test_pictures_of_any_size_are_predicted(
    run_dir, call_script, tmp_path, capfd, set_flags, tiny):
  random = np.random.default_rng(0)
  paths = []
  for i, (kind, shape) in enumerate([
      ('png', (1, 1)), ('png', (32, 32)), ('jpeg', (300, 20)),
      ('jpeg', (17, 500))]):
    paths.append(str(tmp_path / ('%d.%s' % (i, kind))))
    with open(paths[-1], 'wb') as f:
      f.write(_encode(random.integers(0, 256, shape + (3,), np.uint8), kind))
  (tmp_path / 'broken.png').write_bytes(b'no picture')
  set_flags(checkpoint_dir=str(run_dir))
  code = cifar10_eval.predict(
      paths + [str(tmp_path / 'broken.png'), str(tmp_path / 'none.png')])
  assert code == 1
  stdout, stderr = capfd.readouterr()
  lines = [line for line in stdout.splitlines() if line.startswith(
      str(tmp_path))]
  assert len(lines) == 4
  for path, line in zip(paths, lines):
    name, best = line.split(': ')
    shares = [entry.split() for entry in best.split(', ')]
    assert name == path and len(shares) == 3
    assert {share[0] for share in shares} <= set(tiny.classes)
    values = [float(share[1]) for share in shares]
    assert values == sorted(values, reverse=True) and values[0] > 0.1
  assert len(stderr.splitlines()) == 2
  assert 'broken.png: is no' in stderr and 'none.png: No such' in stderr


@pytest.mark.parametrize('run_dir', [28], indirect=True)
def test_exported_model_says_what_evaluation_says(
    run_dir, call_script, run_script, tmp_path, tiny, tiny_dir):
  path = tmp_path / 'predictions.csv'
  _evaluate(call_script, run_dir, tmp_path, '--predictions_csv=%s' % path,
            '--multiview')
  with open(path) as f:
    rows = list(csv.DictReader(f))
  model = tmp_path / 'model'
  FLAGS.checkpoint_dir = str(run_dir)
  assert cifar10_eval.export(str(model)) == 0
  np.save(tmp_path / 'pictures.npy', _pictures(tiny_dir, tiny))
  (tmp_path / 'first.png').write_bytes(_encode(_pictures(tiny_dir, tiny)[0]))
  script = tmp_path / 'load.py'
  script.write_text(
      'import numpy as np, tensorflow as tf\n'
      'signatures = tf.saved_model.load(%r).signatures\n'
      'pictures = np.load(%r)\n'
      'served = signatures["serving_default"](images=tf.constant(pictures))\n'
      'with open(%r, "rb") as f:\n'
      '  one = signatures["encoded"](encoded=tf.constant([f.read()]))\n'
      'print(one["classes"].numpy()[0], one["probabilities"].shape)\n'
      'print(*served["classes"].numpy())\n' % (
          str(model), str(tmp_path / 'pictures.npy'),
          str(tmp_path / 'first.png')))
  run = run_script(str(script))
  assert run.code == 0, run.stderr
  first, classes = run.stdout.splitlines()
  classes = [tiny.classes[int(label)] for label in classes.split()]
  assert classes == [row['prediction'] for row in rows]
  assert first == '%d (1, 10)' % tiny.classes.index(classes[0])
  with pytest.raises(UserError, match='exists already'):
    cifar10_eval.export(str(model))


# Other data sets.


def test_fit_leaves_pictures_of_the_right_size_as_they_are():
  random = np.random.default_rng(0)
  pictures = random.integers(0, 256, (3, 32, 32, 3)).astype(np.float32)
  with tf.Session() as session:
    fitted = session.run(cifar10_input.fit(
        tf.constant(pictures), cifar10_input.CIFAR10))
  np.testing.assert_array_equal(fitted, pictures.transpose(0, 3, 1, 2))


def test_fit_halves_and_cuts_as_an_antialiased_resize_does():
  random = np.random.default_rng(0)
  picture = random.integers(0, 256, (1, 64, 96, 3)).astype(np.float32)
  with tf.Session() as session:
    fitted, resized = session.run([
        cifar10_input.fit(tf.constant(picture), cifar10_input.CIFAR10),
        tf.compat.v2.image.resize(picture, [32, 48], antialias=True)])
  np.testing.assert_allclose(
      fitted, np.rint(resized[:, :, 8:40].transpose(0, 3, 1, 2)), atol=1)


@pytest.mark.parametrize('dataset, offset', [
    (CIFAR100, 1), (CIFAR100_COARSE, 0)])
def test_cifar100_has_two_labels_and_takes_the_right_one(dataset, offset):
  record = bytes([7, 42]) + bytes(3072)
  with tf.Session() as session:
    _, labels = session.run(cifar10_input.parse_records([record], dataset))
  assert labels.tolist() == [record[offset]]
  assert dataset.record_bytes == 3074
  assert len(set(dataset.classes)) == len(dataset.classes) == (100, 20)[
      offset == 0]


def test_coarse_labels_are_those_of_cifar100_alone(set_flags, tmp_path):
  set_flags(dataset='cifar10', label='coarse', data_dir=str(tmp_path))
  with pytest.raises(UserError, match='--dataset=cifar100'):
    cifar10.prepare_dataset()


@pytest.fixture
def svhn(tmp_path):
  """SVHN with a few pictures, whose MATLAB files are in place."""
  scipy_io = pytest.importorskip('scipy.io')
  random = np.random.default_rng(0)
  files, downloads = {}, {}
  for name, n in (('train_32x32', 30), ('test_32x32', 20)):
    path = tmp_path / (name + '.mat')
    scipy_io.savemat(path, {
        'X': random.integers(0, 256, (32, 32, 3, n), np.uint8),
        'y': random.integers(1, 11, (n, 1)).astype(np.uint8)})
    files[name + '.bin'] = n
    downloads['http://127.0.0.1:1/%s.mat' % name] = cifar10_input._sha256(path)
  return dataclasses.replace(
      SVHN, train_files={'train_32x32.bin': 30},
      eval_files={'test_32x32.bin': 20}, downloads=downloads)


def test_svhn_is_converted_from_matlab(svhn, tmp_path):
  import scipy.io
  folder = cifar10_input.maybe_download_and_extract(svhn, str(tmp_path))
  cifar10_input.check_files(svhn, folder, svhn.files)
  original = scipy.io.loadmat(tmp_path / 'test_32x32.mat')
  records = np.fromfile(
      os.path.join(folder, 'test_32x32.bin'), np.uint8).reshape(20, 3073)
  np.testing.assert_array_equal(records[:, 0], original['y'][:, 0] % 10)
  np.testing.assert_array_equal(
      records[3, 1:].reshape(3, 32, 32),
      original['X'][:, :, :, 3].transpose(2, 0, 1))


def test_svhn_without_scipy_is_one_line(svhn, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'scipy', None)
  with pytest.raises(UserError, match='pip install scipy'):
    cifar10_input.maybe_download_and_extract(svhn, str(tmp_path))


@pytest.fixture
def own_pictures(tmp_path):
  """A folder with two classes of pictures of several sizes and kinds."""
  random = np.random.default_rng(0)
  for part, count in (('train', 12), ('test', 5)):
    for label, name in enumerate(['dark', 'light']):
      folder = tmp_path / 'mine' / part / name
      folder.mkdir(parents=True)
      for i in range(count):
        shape = tuple(random.integers(20, 90, 2)) + (3,)
        picture = random.integers(0, 60, shape) + 180 * label
        kind = ('png', 'jpeg')[i % 2]
        (folder / ('%d.%s' % (i, kind))).write_bytes(
            _encode(picture.astype(np.uint8), kind))
  (tmp_path / 'mine' / 'train' / 'dark' / 'broken.png').write_text('nothing')
  return tmp_path / 'mine'


def test_own_pictures_are_converted_once(
    own_pictures, tmp_path, capfd, set_flags):
  set_flags(dataset=str(own_pictures), data_dir=str(tmp_path / 'data'))
  dataset = cifar10.prepare_dataset()
  assert dataset.classes == ('dark', 'light')
  assert (dataset.num_train_examples, dataset.num_eval_examples) == (24, 10)
  assert 'Skipped %s' % (own_pictures / 'train' / 'dark' / 'broken.png') in (
      capfd.readouterr().out)
  folder = tmp_path / 'data' / dataset.folder
  records = np.fromfile(folder / 'train.bin', np.uint8).reshape(-1, 3073)
  assert records[:, 0].tolist() == [0] * 12 + [1] * 12
  assert records[:12, 1:].max() < 90 < 150 < records[12:, 1:].min()
  before = (folder / 'train.bin').stat().st_mtime_ns
  assert cifar10.prepare_dataset().folder == dataset.folder
  assert (folder / 'train.bin').stat().st_mtime_ns == before
  (own_pictures / 'test' / 'dark' / '0.png').unlink()
  assert cifar10.prepare_dataset().num_eval_examples == 9


def test_own_pictures_are_trained_on_and_evaluated(
    own_pictures, tmp_path, call_script):
  run = call_script(
      cifar10_train.main, '--dataset=%s' % own_pictures, '--batch_size=4',
      '--data_dir=%s' % (tmp_path / 'data'), '--max_steps=3',
      '--train_dir=%s' % (tmp_path / 'run'))
  assert (run.code, run.stderr) == (0, '')
  for name in ('dataset', 'data_dir'):
    FLAGS[name].using_default_value = True
  run = _evaluate(call_script, tmp_path / 'run', tmp_path)
  assert '/10 correct at step 3\n' in run.stdout
  assert '  light ' in run.stdout


@pytest.mark.parametrize('folders', [
    [], ['train/a', 'train/b'], ['train/a', 'test/a'],
    ['train/a', 'train/b', 'test/a', 'test/b']])
def test_folder_without_pictures_is_explained_in_one_line(
    tmp_path, call_script, folders):
  (tmp_path / 'mine').mkdir()
  for folder in folders:
    (tmp_path / 'mine' / folder).mkdir(parents=True)
  run = call_script(
      cifar10_train.main, '--dataset=%s' % (tmp_path / 'mine'),
      '--data_dir=%s' % (tmp_path / 'data'),
      '--train_dir=%s' % (tmp_path / 'run'))
  assert run.code == 1
  assert run.stderr.count('\n') == 1
  assert '--dataset=%s' % (tmp_path / 'mine') in run.stderr


def test_run_of_other_data_is_refused_before_they_are_fetched(
    run_dir, call_script, tmp_path):
  run = call_script(
      cifar10_train.main, '--train_dir=%s' % run_dir, '--dataset=cifar10',
      '--data_dir=%s' % (tmp_path / 'data'))
  assert run.code == 1
  assert run.stderr.count('\n') == 1
  assert 'trained with --dataset=synthetic, not cifar10' in run.stderr
  assert not (tmp_path / 'data').exists()

"""How fast a training step is, beside the plain formulation and the limit.

    python tests/benchmarks/train_speed.py      # about half an hour

Every figure comes from another process, and the variants take turns, so that
all of them see a noisy machine alike: compare figures of one run only. The
limit is our step without its local response normalizations and with one
constant batch for input, which leaves the convolutions and matrix products. No
variant writes summaries or checkpoints, which come every 100 steps and every
ten minutes. Prints tables; writes results/train_speed.json and .png.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

START = time.time()
HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [HERE, SCRIPTS]

IMAGE_SIZE = 24
WARM_UP_STEPS = 10
TIMED_STEPS = 40
LONG_RUN = (500, 5000)  # Steps after which memory is compared.

# The variants that take turns: suite, dtype, whether with input.
VARIANTS = [(suite, dtype, input_)
            for suite in ('plain', 'ours', 'limit')
            for dtype in ('float32', 'bfloat16')
            for input_ in (True, False)]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--worker', help='JSON; used by the benchmark itself')
  args = parser.parse_args()
  if args.worker:
    variant = json.loads(args.worker)
    if variant['suite'] == 'input':
      work_input(variant['data_dir'])
    else:
      work(**variant)
    return
  with tempfile.TemporaryDirectory() as data_dir:
    write_records(data_dir)
    results = {
        'machine': machine(),
        'steps': take_turns(VARIANTS, args.rounds, data_dir),
        'growth': grow(max(1, args.rounds // 2), data_dir),
        'input': run_worker(suite='input', data_dir=data_dir),
        'long_run': run_worker(suite='ours', dtype='bfloat16', input_=True,
                               data_dir=data_dir, steps=LONG_RUN[1]),
    }
  os.makedirs(os.path.join(HERE, 'results'), exist_ok=True)
  with open(os.path.join(HERE, 'results', 'train_speed.json'), 'w') as f:
    json.dump(results, f, indent=1)
  print_tables(results)
  draw(results, os.path.join(HERE, 'results', 'train_speed.png'))


def machine():
  """Returns what a reader must know to compare figures."""
  from importlib import metadata
  import platform
  with open('/proc/cpuinfo') as f:
    cpuinfo = dict(line.split(':', 1) for line in f if ':' in line)
  fields = {key.strip(): value.strip() for key, value in cpuinfo.items()}
  features = set(fields['flags'].split())
  return {
      'cpu': fields['model name'],
      'processors': os.cpu_count(),
      'features': sorted(features & {
          'avx2', 'avx512f', 'avx512_bf16', 'avx512_fp16', 'avx512_vnni',
          'amx_tile', 'amx_bf16'}),
      'oneDNN': os.environ.get('TF_ENABLE_ONEDNN_OPTS', '1') == '1',
      'gpus': gpus(),
      'python': platform.python_version(),
      'versions': {name: metadata.version(name)
                   for name in ('tensorflow', 'numpy', 'keras')},
      'date': time.strftime('%Y-%m-%d'),
  }


def gpus():
  """Returns the names of NVIDIA's GPUs, on which all libraries compute."""
  try:
    return subprocess.run(
        ['nvidia-smi', '--query-gpu=name', '--format=csv,noheader'], check=True,
        stdout=subprocess.PIPE, text=True).stdout.splitlines()
  except (OSError, subprocess.CalledProcessError):
    return []


def write_records(data_dir):
  """Writes noise in CIFAR-10's format: the pixels do not change the speed."""
  import numpy as np
  random = np.random.default_rng(1)
  folder = os.path.join(data_dir, 'cifar-10-batches-bin')
  os.makedirs(folder)
  for name in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']:
    records = random.integers(0, 256, [10000, 3073], np.uint8)
    records[:, 0] %= 10
    records.tofile(os.path.join(folder, name + '.bin'))


# The process that measures one variant.


def work(suite, dtype, input_, data_dir, batch_size=128, towers=1,
         steps=TIMED_STEPS):
  """Trains a few steps of a variant, prints a dict of figures and exits."""
  import cifar10_input  # Before TensorFlow: it hides the start-up messages.
  import tensorflow.compat.v1 as tf
  import_secs, import_mb = time.time() - START, resident_mb()
  with tf.Graph().as_default():
    batch = None if input_ else constant_batch(tf, batch_size * towers)
    build = build_plain if suite == 'plain' else build_ours
    train_op, loss = build(
        tf, suite, dtype, batch, data_dir, batch_size, towers)
    graph_secs = time.time() - START
    with tf.train.MonitoredTrainingSession() as session:
      session.run([train_op, loss])
      first_step_secs = time.time() - START
      for _ in range(WARM_UP_STEPS):
        session.run([train_op, loss])
      step_ms, mb = [], []
      for _ in range(steps):
        start = time.perf_counter()
        session.run([train_op, loss])
        step_ms.append((time.perf_counter() - start) * 1e3)
        if len(step_ms) in LONG_RUN + (steps,):
          mb.append(resident_mb())
      figures = {
          'ms': statistics.median(step_ms), 'import_secs': import_secs,
          'graph_secs': graph_secs, 'first_step_secs': first_step_secs,
          'import_mb': import_mb, 'mb': mb[-1], 'mb_before': mb[0]}
      sys.stdout.flush()
      print(json.dumps(figures), flush=True)
      os._exit(0)  # Threads that fill queues would take their time to end.


def work_input(data_dir, batch_size=128):
  """Measures the parts of the input alone, in ms for a batch."""
  import cifar10_input
  import tensorflow.compat.v1 as tf
  from cifar10_input import CIFAR10
  paths = [os.path.join(data_dir, CIFAR10.folder, name)
           for name in CIFAR10.train_files]
  _, values = tf.FixedLengthRecordReader(CIFAR10.record_bytes).read_up_to(
      tf.train.string_input_producer(paths), batch_size)
  queue = tf.RandomShuffleQueue(20384, 20000, [tf.string], [[]])
  record = tf.fill([batch_size], 'x' * CIFAR10.record_bytes)
  enqueue = queue.enqueue_many([record])
  with tf.control_dependencies([enqueue]):
    pass_through = queue.dequeue_many(batch_size)
  planes, _ = cifar10_input.parse_records(record, CIFAR10)
  images = cifar10_input.distort(
      planes, cifar10_input.draw_distortions(batch_size, IMAGE_SIZE),
      IMAGE_SIZE)
  ms = {}
  with tf.Session() as session:
    tf.train.start_queue_runners(session)
    while session.run(queue.size()) < 20000:
      session.run(enqueue)
    for part, operation in [('reader', values.op), ('queue', pass_through.op),
                            ('distortion', images.op)]:
      each = []
      for _ in range(WARM_UP_STEPS + 10 * TIMED_STEPS):
        start = time.perf_counter()
        session.run(operation)
        each.append((time.perf_counter() - start) * 1e3)
      ms[part] = statistics.median(each[WARM_UP_STEPS:])
    print(json.dumps(ms), flush=True)
    os._exit(0)


def resident_mb():
  with open('/proc/self/statm') as f:
    return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6


def constant_batch(tf, batch_size):
  images = tf.get_variable(
      'images', trainable=False, initializer=tf.random_normal(
          [batch_size, IMAGE_SIZE, IMAGE_SIZE, 3]))
  labels = tf.get_variable(
      'labels', initializer=tf.random_uniform([batch_size], 0, 10, tf.int32),
      trainable=False)
  return tf.identity(images), tf.identity(labels)


def build_plain(tf, suite, dtype, batch, data_dir, batch_size, towers):
  import plain
  return plain.build_step(
      os.path.join(data_dir, 'cifar-10-batches-bin'), batch_size,
      tf.as_dtype(dtype), batch)[:2]


def build_ours(tf, suite, dtype, batch, data_dir, batch_size, towers):
  import cifar10
  import cifar10_input
  import cifar10_multi_gpu_train
  import cifar10_train
  cifar10_multi_gpu_train.define_flags()
  cifar10.FLAGS(['worker', f'--batch_size={batch_size}', f'--num_gpus={towers}',
                 f'--use_bfloat16={dtype == "bfloat16"}'])
  dataset = cifar10_input.CIFAR10
  if batch:
    cifar10.distorted_inputs = lambda *args, **kwargs: batch
  else:
    dataset = cifar10_input.prepare(dataset, data_dir)
  if suite == 'limit':
    cifar10.local_response_normalization = lambda images, **kwargs: images
  script = cifar10_multi_gpu_train if towers > 1 else cifar10_train
  return script.build_step(
      dataset, cifar10_train.flags_recipe(dataset),
      tf.train.get_or_create_global_step())


# The process that compares.


def run_worker(script=__file__, **variant):
  process = subprocess.run(
      [sys.executable, os.path.abspath(script), '--worker',
       json.dumps(variant)], check=True, stdout=subprocess.PIPE)
  return json.loads(process.stdout.decode().splitlines()[-1])


def take_turns(variants, rounds, data_dir):
  """Returns for each variant a list of figures, one a round."""
  figures = {name(*variant): [] for variant in variants}
  for i in range(rounds):
    for suite, dtype, input_ in variants:
      figure = run_worker(
          suite=suite, dtype=dtype, input_=input_, data_dir=data_dir)
      figures[name(suite, dtype, input_)].append(figure)
      print(f'round {i + 1} of {rounds}: {name(suite, dtype, input_):30} '
            f'{figure["ms"]:6.1f} ms', flush=True)
  return figures


def name(suite, dtype, input_):
  return f'{suite} {dtype}{" with input" if input_ else ""}'


def grow(rounds, data_dir):
  """Returns how cost grows with the batch and with the number of towers."""
  rows = []
  cases = [(batch_size, 1) for batch_size in (32, 64, 128, 256, 512, 1024)]
  cases += [(128 // towers, towers) for towers in (2, 4)]
  cases += [(43, 3)]  # 129 images: 128 cannot be shared by three.
  for dtype in ('float32', 'bfloat16'):
    figures = {case: [] for case in cases}
    for _ in range(rounds):
      for batch_size, towers in cases:
        figures[batch_size, towers].append(run_worker(
            suite='ours', dtype=dtype, input_=True, data_dir=data_dir,
            batch_size=batch_size, towers=towers))
    for (batch_size, towers), each in figures.items():
      rows.append({'dtype': dtype, 'batch_size': batch_size, 'towers': towers,
                   'ms': median(each, 'ms'), 'mb': median(each, 'mb'),
                   'each_ms': [figure['ms'] for figure in each]})
  return rows


def median(figures, key):
  return statistics.median(figure[key] for figure in figures)


def ratio(figures, over, under):
  """Returns the median of the ratios within each round, and their spread."""
  ratios = [a['ms'] / b['ms'] for a, b in zip(figures[over], figures[under])]
  return statistics.median(ratios), min(ratios), max(ratios)


def print_tables(results):
  steps = results['steps']
  print(f'\n{json.dumps(results["machine"])}')
  print(f'\n{"a step of 128 images":30} {"ms":>8} {"min to max":>17} '
        f'{"above import":>9} {"first step":>11}')
  for key, figures in steps.items():
    ms = [figure['ms'] for figure in figures]
    mb = median(figures, 'mb') - median(figures, 'import_mb')
    print(f'{key:30} {statistics.median(ms):8.1f} {min(ms):8.1f} '
          f'{max(ms):8.1f} {mb:9.0f} MB '
          f'{median(figures, "first_step_secs"):9.1f} s')
  print(f'\n{"ratio, paired":69} {"min to max":>14}')
  for over, under in [
      ('plain float32 with input', 'ours float32 with input'),
      ('plain float32 with input', 'ours bfloat16 with input'),
      ('ours float32 with input', 'limit float32'),
      ('ours bfloat16 with input', 'limit bfloat16'),
      ('ours float32 with input', 'ours float32'),
      ('ours bfloat16 with input', 'ours bfloat16')]:
    middle, low, high = ratio(steps, over, under)
    print(f'{f"{over} / {under}":62} {middle:6.2f} {low:6.2f} {high:6.2f}')
  print_growth(results['growth'])
  parts = [f'{part} {ms:.1f}' for part, ms in results['input'].items()]
  print(f'\nthe input alone, ms for 128 images: {", ".join(parts)}')
  long_run = results['long_run']
  print(f'resident after {LONG_RUN[0]} and {LONG_RUN[1]} steps: '
        f'{long_run["mb_before"]:.0f} and {long_run["mb"]:.0f} MB')
  imported, built, stepped = (
      median(steps['ours float32 with input'], f'{part}_secs')
      for part in ('import', 'graph', 'first_step'))
  print(f'until the first step: import {imported:.1f} s, graph '
        f'{built - imported:.1f} s, then {stepped - built:.1f} s')


def print_growth(rows):
  print(f'\n{"dtype":10} {"batch":>6} {"towers":>7} {"ms":>8} '
        f'{"images/sec":>12} {"MB":>7}')
  for row in rows:
    speed = row['batch_size'] * row['towers'] / row['ms'] * 1e3
    print(f'{row["dtype"]:10} {row["batch_size"]:6} {row["towers"]:7} '
          f'{row["ms"]:8.1f} {speed:12.0f} {row["mb"]:7.0f}')
  each_ms = {(row['dtype'], row['towers'], row['batch_size']): row['each_ms']
             for row in rows}
  for dtype in ('float32', 'bfloat16'):
    ratios = [two / one for two, one in zip(
        each_ms[dtype, 2, 64], each_ms[dtype, 1, 128])]
    print(f'{dtype}: two towers of 64 / one batch of 128: '
          f'{statistics.median(ratios):.2f} ({min(ratios):.2f} to '
          f'{max(ratios):.2f})')


def draw(results, path):
  keys = ['plain float32 with input', 'ours float32 with input',
          'limit float32', 'plain bfloat16 with input',
          'ours bfloat16 with input', 'limit bfloat16']
  draw_bars({key: median(results['steps'][key], 'ms') for key in keys},
            ['#9db4c0', '#e07a1f', '#5c6b73'] * 2, results['machine'], path)


def draw_bars(ms, colours, on, path):
  """Draws ms a step, a dict by names, as horizontal bars from the top."""
  import matplotlib
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(figsize=(9, 1 + 0.25 * len(ms)))
  bars = axes.barh(list(ms), list(ms.values()), color=colours)
  axes.bar_label(bars, fmt=' %.0f')
  axes.invert_yaxis()
  axes.set_xlabel('ms a step of 128 images\n' + ', '.join(on['gpus'] or [
      on['cpu'], f'{on["processors"]} cores', *on['features'],
      f'oneDNN {"on" if on["oneDNN"] else "off"}']))
  axes.spines[['top', 'right']].set_visible(False)
  figure.tight_layout()
  figure.savefig(path, dpi=110)


if __name__ == '__main__':
  main()

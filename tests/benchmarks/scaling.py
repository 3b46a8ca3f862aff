"""What to expect of a cluster: a model of its speed, and runs to check it by.

    python tests/benchmarks/scaling.py      # some ten minutes

The model: in a synchronous step each worker reads all variables, computes, and
sends all gradients. With W workers, the fullest parameter server moves W times
its share of the bytes through its link, once in each direction, and spends some
time of its processors on each worker:

    secs = compute + 2 * max(W * share, 1) * bytes * 8 / bits_per_sec
           + round_trips * latency + W * share * server_secs

`compute` is a step in one process; `server_secs` is what a cluster of one
worker takes beyond that on this machine, where a byte costs no more than its
copies. The runs that check it: 1, 2 and 3 workers on this machine's loopback,
which share its processors, so that the model says W * (compute + server_secs);
and, as root on Linux with iproute2, in network namespaces whose links are
slowed down, so that the network's term is most of it. What more processors than
these would do, the runs cannot show. Prints tables; writes results/scaling.json
and a picture, scaling.png.
"""
import argparse
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile

import train_speed

SCRIPT = os.path.join(sys.path[1], 'cifar10_multi_gpu_train.py')
WORKERS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
SERVERS = [1, 2, 4, 16, 64]
GIGABITS = [1, 10, 100]
ROUND_TRIPS = 4  # Ticket, variables, gradients, update.
SLOW_LINKS = [1000, 200]  # Mbit/s, in each direction.
LATENCY_SECS = 1e-4  # Of the network, there and back.


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  results = {'machine': train_speed.machine(), 'bytes': count_bytes(),
             'shares': {n: share(n) for n in SERVERS}, 'runs': []}
  with tempfile.TemporaryDirectory() as folder:
    train_speed.write_records(folder)
    for _ in range(args.rounds):
      results['runs'] += run_all(folder)
  results['compute_secs'] = median_secs(results, 'loopback', 0)
  results['server_secs'] = (
      median_secs(results, 'loopback', 1) - results['compute_secs'])
  path = os.path.join(train_speed.HERE, 'results', 'scaling')
  with open(path + '.json', 'w') as f:
    json.dump(results, f, indent=1)
  print_tables(results)
  draw(results, path + '.png')


# The model.


def count_bytes():
  """Returns how many bytes of variables a worker reads in a step."""
  import cifar10
  with cifar10.tf.Graph().as_default():
    cifar10.FLAGS(['scaling'])
    cifar10.inference(cifar10.tf.zeros([1, 24, 24, 3]))
    return 4 * sum(v.shape.num_elements()
                   for v in cifar10.tf.trainable_variables())


def share(servers):
  """Returns which part of the bytes lies on the fullest parameter server."""
  import cifar10
  tf = cifar10.tf
  # Variables go round the servers in the order in which they are made.
  with tf.Graph().as_default(), tf.device(
      tf.train.replica_device_setter(servers)):
    tf.train.get_or_create_global_step()
    cifar10.inference(tf.zeros([1, 24, 24, 3]))
    sizes = {}
    for variable in tf.trainable_variables():
      sizes[variable.device] = (
          sizes.get(variable.device, 0) + variable.shape.num_elements())
  return max(sizes.values()) / sum(sizes.values())


def predict(results, workers, share, bits_per_sec, up_bytes=None,
            shared=False):
  """Returns the seconds of a synchronous step.

  Args:
    results: dict of measurements, see `main`.
    workers: int, the chief included.
    share: part of the bytes on the fullest parameter server.
    bits_per_sec: of each link, in each direction.
    up_bytes: bytes of a worker's gradients, if not as many as of variables.
    shared: whether all tasks share the processors of one machine.
  """
  down, up = results['bytes'], up_bytes or results['bytes']
  crowd = workers if shared else 1
  return (crowd * results['compute_secs']
          + max(workers * share, 1) * (down + up) * 8 / bits_per_sec
          + ROUND_TRIPS * LATENCY_SECS
          + workers * share * results['server_secs'])


# The runs.


def run_all(data_dir):
  """Returns a run of each kind: dicts of network, workers and seconds."""
  runs = [{'network': 'loopback', 'workers': workers,
           'secs': run_cluster(data_dir, ['127.0.0.1'] * 4, [[]] * 4, workers)}
          for workers in range(4)]
  for mbits in SLOW_LINKS if can_slow_down() else []:
    with slow_network(mbits) as (hosts, prefixes):
      runs += [{'network': '%d Mbit/s' % mbits, 'workers': workers,
                'secs': run_cluster(data_dir, hosts, prefixes, workers)}
               for workers in (1, 2, 3)]
  for run in runs:
    print('%(network)-11s %(workers)d workers %(secs).3f s a step' % run,
          flush=True)
  return runs


def run_cluster(data_dir, hosts, prefixes, workers):
  """Returns the seconds of a step; without workers, those of one process.

  The first host has the parameter server, the next ones a worker each.
  """
  addresses = ['%s:%d' % (host, free_port()) for host in hosts]
  cluster = {'ps': addresses[:1], 'chief': addresses[1:2],
             'worker': addresses[2:1 + workers]}
  tasks = [('ps', 0), ('chief', 0)] + [
      ('worker', i) for i in range(workers - 1)]
  with tempfile.TemporaryDirectory() as train_dir:
    command = [
        sys.executable, SCRIPT, '--data_dir=' + data_dir, '--use_bfloat16',
        '--train_dir=' + train_dir, '--max_steps=81', '--log_frequency=10',
        '--save_summary_steps=1000']
    processes = []
    for (job, index), prefix in list(zip(tasks, prefixes)):
      config = {'cluster': cluster, 'task': {'type': job, 'index': index}}
      environment = dict(os.environ)
      if workers:
        environment['TF_CONFIG'] = json.dumps(config)
      elif job == 'ps':
        continue
      processes.append(subprocess.Popen(
          prefix + command, env=environment, stdout=subprocess.PIPE,
          text=True))
    outputs = [process.communicate(timeout=600)[0] for process in processes]
  if any(process.returncode for process in processes):
    raise RuntimeError('a task failed')
  secs = re.findall(r'step \d+, .*; ([\d.]+) sec/batch',
                    outputs[1 if workers else 0])
  return statistics.median(map(float, secs[2:]))


def free_port():
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]


def can_slow_down():
  return os.geteuid() == 0 and not subprocess.run(
      'ip netns add scaling && ip netns del scaling && tc -V', shell=True,
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


@contextlib.contextmanager
def slow_network(mbits):
  """Makes four hosts with links of a speed, joined by a bridge.

  Yields:
    Their addresses, and the commands with which a command runs on each.
  """
  def run(command):
    subprocess.run(command.split(), check=True)

  limit = 'root tbf rate %dmbit burst 512kb limit 32mb' % mbits
  # The system takes its time to give a name back.
  bridge = 'scaling%d' % mbits
  names = ['%s-%d' % (bridge, i) for i in range(4)]
  try:
    run('ip link add %s type bridge' % bridge)
    run('ip link set %s up' % bridge)
    for i, name in enumerate(names):
      run('ip netns add ' + name)
      run('ip link add %s type veth peer name eth0 netns %s' % (name, name))
      run('ip link set %s master %s up' % (name, bridge))
      run('ip -n %s addr add 10.77.0.%d/24 dev eth0' % (name, i + 1))
      run('ip -n %s link set eth0 up' % name)
      run('ip -n %s link set lo up' % name)
      run('tc qdisc add dev %s %s' % (name, limit))
      run('ip netns exec %s tc qdisc add dev eth0 %s' % (name, limit))
    yield (['10.77.0.%d' % (i + 1) for i in range(4)],
           [['ip', 'netns', 'exec', name] for name in names])
  finally:
    for name in names:
      subprocess.run(['ip', 'netns', 'del', name], check=False)
    subprocess.run(['ip', 'link', 'del', bridge], check=False)


# What it comes to.


def median_secs(results, network, workers):
  return statistics.median(
      run['secs'] for run in results['runs']
      if (run['network'], run['workers']) == (network, workers))


def print_tables(results):
  print('\n%s\n%.2f MB of variables; compute %.1f ms, a server\'s work for a '
        'worker %.1f ms' % (
            json.dumps(results['machine']), results['bytes'] / 1e6,
            results['compute_secs'] * 1e3, results['server_secs'] * 1e3))
  print('\n%-11s %7s %9s %9s %6s' % (
      'network', 'workers', 'measured', 'predicted', 'ratio'))
  for network, workers in sorted({
      (run['network'], run['workers']) for run in results['runs']
      if run['workers']}):
    measured = median_secs(results, network, workers)
    mbits = 1e6 if network == 'loopback' else int(network.split()[0])
    predicted = predict(results, workers, 1, mbits * 1e6, shared=True)
    print('%-11s %7d %7.0fms %7.0fms %6.2f' % (
        network, workers, measured * 1e3, predicted * 1e3,
        measured / predicted))
  for gigabits in GIGABITS:
    print('\nsteps/sec, %d Gbit/s; all workers together learn from 128 times '
          'their number of images in each\n%8s%s' % (
              gigabits, 'workers', ''.join('%8d ps' % n for n in SERVERS)))
    for workers in WORKERS:
      print('%8d%s' % (workers, ''.join(
          '%11.2f' % (1 / predict(results, workers, results['shares'][servers],
                                  gigabits * 1e9)) for servers in SERVERS)))
  print('\nGradients as bfloat16, with one server: a step takes')
  for gigabits in GIGABITS:
    for workers in (1, 10, 100):
      full, half = (predict(results, workers, 1, gigabits * 1e9,
                            up_bytes=up_bytes)
                    for up_bytes in (None, results['bytes'] / 2))
      print('%4d Gbit/s, %4d workers: %.2f as long' % (
          gigabits, workers, half / full))


def draw(results, path):
  import matplotlib
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(1, len(GIGABITS), figsize=(11, 3.6), sharey=True)
  for ax, gigabits in zip(axes, GIGABITS):
    for servers in SERVERS:
      ax.loglog(WORKERS, [
          workers * 128 / predict(results, workers, results['shares'][servers],
                                  gigabits * 1e9)
          for workers in WORKERS], label='%d ps' % servers)
    ax.loglog(WORKERS, [workers * 128 / results['compute_secs']
                        for workers in WORKERS], 'k:', label='no network')
    ax.set_title('%d Gbit/s' % gigabits)
    ax.set_xlabel('workers')
    ax.spines[['top', 'right']].set_visible(False)
  axes[0].set_ylabel('images/sec, predicted')
  axes[0].legend(frameon=False, fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=110)


if __name__ == '__main__':
  main()

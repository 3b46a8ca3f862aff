"""Downloads: what is whole is used, what is broken is never taken for whole.

The archives come from a server on this machine and hold a data set of a few
records. After each attempt, the data directory holds what it should, no more.
"""
import dataclasses
import gzip
import hashlib
import http.server
import io
import os
import pathlib
import signal
import socket
import tarfile
import threading
import types

import numpy as np
import pytest

import cifar10_input
import cifar10_train
from cifar10_input import UserError

ARCHIVE = 'tiny.tar.gz'


# Archives.


@pytest.fixture(scope='module')
def records(tiny):
  """The contents of the data set's files, by name."""
  random = np.random.default_rng(0)
  return {
      name: random.integers(0, 10, tiny.size_bytes(name), np.uint8).tobytes()
      for name in tiny.files}


def _member(name, content=b'', **attributes):
  member = tarfile.TarInfo(name)
  member.size = len(content)
  for attribute, value in attributes.items():
    setattr(member, attribute, value)
  return member, io.BytesIO(content)


def _archive(*members):
  """Returns the bytes of an archive."""
  archive = io.BytesIO()
  with tarfile.open(fileobj=archive, mode='w:gz') as tar:
    for member, content in members:
      tar.addfile(member, content if member.isfile() else None)
  return archive.getvalue()


@pytest.fixture(scope='module')
def members(tiny, records):
  """What a whole archive holds."""
  return [
      _member(tiny.folder, type=tarfile.DIRTYPE, mode=0o755),
      _member(tiny.folder + '/batches.meta.txt', b'airplane\n'),
      *(_member('%s/%s' % (tiny.folder, name), content)
        for name, content in records.items())]


@pytest.fixture(scope='module')
def whole(tiny, records):
  return _archive(*(_member('%s/%s' % (tiny.folder, name), content)
                    for name, content in records.items()),
                  _member(tiny.folder + '/batches.meta.txt', b'airplane\n'))


# The server.


@pytest.fixture
def server(monkeypatch, whole):
  """A server of one archive: its `url`, `content`, and what was asked of it.

  It breaks off after `sends` bytes if that is set, or then says nothing more
  until `patience` is set.
  """
  state = types.SimpleNamespace(
      content=whole, sends=None, status=200, requests=[], location=None,
      patience=None)

  class Handler(http.server.BaseHTTPRequestHandler):

    def do_GET(self):
      state.requests.append(self.path)
      location, state.location = state.location, None
      self.send_response(302 if location else state.status)
      if location:
        self.send_header('Location', location)
      self.send_header('Content-Length', str(len(state.content)))
      self.end_headers()
      self.wfile.write(state.content[:state.sends])
      if state.patience:
        state.patience.wait()

    def log_message(self, *unused):
      pass

  for name in ('no_proxy', 'NO_PROXY'):
    monkeypatch.setenv(name, '127.0.0.1')
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
    thread = threading.Thread(target=httpd.serve_forever, args=[0.05])
    thread.start()
    state.url = 'http://127.0.0.1:%d/%s' % (httpd.server_port, ARCHIVE)
    yield state
    httpd.shutdown()
    thread.join()


def _sha256(content):
  return hashlib.sha256(content).hexdigest()


@pytest.fixture
def dataset(tiny, server, whole):
  """A data set whose archive the server publishes."""
  return dataclasses.replace(
      tiny, downloads={server.url: _sha256(whole)}, make=cifar10_input._extract)


def _publish(dataset, url=None, sha256=None):
  """Returns the data set with another archive."""
  (its_url, its_sha256), = dataset.downloads.items()
  return dataclasses.replace(
      dataset, downloads={url or its_url: sha256 or its_sha256})


def _published_sha256(dataset):
  return next(iter(dataset.downloads.values()))


@pytest.fixture
def data_dir(tmp_path):
  """A data directory, beside which nothing may appear."""
  folder = tmp_path / 'outer' / 'data'
  folder.mkdir(parents=True)
  return folder


def _get(dataset, data_dir, **arguments):
  return cifar10_input.maybe_download_and_extract(
      dataset, str(data_dir), **arguments)


def _fail(dataset, data_dir, **arguments):
  """Returns the complaint, a single line."""
  with pytest.raises(UserError) as error:
    _get(dataset, data_dir, **arguments)
  message = str(error.value)
  assert '\n' not in message
  return message


def _tree(folder):
  """Returns all that lies below a folder: files with their contents."""
  return {str(path.relative_to(folder)): path.read_bytes()
          for path in pathlib.Path(folder).rglob('*')
          if path.name != '.lock' and (path.is_file() or path.is_symlink())}


def _extracted(dataset, records):
  return {'%s/%s' % (dataset.folder, name): content
          for name, content in records.items()}


# Whole ones.


def test_archive_is_downloaded_and_extracted(
    dataset, data_dir, server, records, whole, capfd):
  folder = _get(dataset, data_dir)
  assert folder == str(data_dir / dataset.folder)
  assert server.requests == ['/' + ARCHIVE]
  assert _tree(data_dir) == {ARCHIVE: whole, **_extracted(dataset, records)}
  assert cifar10_input.check_files(dataset, folder, dataset.files)
  stdout, stderr = capfd.readouterr()
  assert 'Downloading %s' % server.url in stdout
  assert stderr == ''


def test_data_directory_is_made_if_need_be(dataset, data_dir, records, whole):
  _get(dataset, data_dir / 'of' / 'mine')
  assert _tree(data_dir / 'of' / 'mine') == {
      ARCHIVE: whole, **_extracted(dataset, records)}


def test_what_is_there_is_not_downloaded_again(dataset, data_dir, server):
  for _ in range(2):
    _get(dataset, data_dir)
  assert len(server.requests) == 1


def test_half_extracted_folder_is_completed_from_the_archive(
    dataset, data_dir, server, records, whole):
  _get(dataset, data_dir)
  (data_dir / dataset.folder / 'second.bin').unlink()
  (data_dir / (dataset.folder + '.partial')).mkdir()
  (data_dir / (dataset.folder + '.partial') / 'first.bin').write_bytes(b'half')
  _get(dataset, data_dir)
  assert len(server.requests) == 1
  assert _tree(data_dir) == {ARCHIVE: whole, **_extracted(dataset, records)}


def test_mirror_is_held_to_the_published_checksum(
    dataset, data_dir, server, records):
  published = _publish(dataset, url='http://example.invalid/' + ARCHIVE)
  _get(published, data_dir, url=server.url)
  assert _extracted(dataset, records).items() <= _tree(data_dir).items()
  server.content += b'more'
  message = _fail(published, data_dir.parent / 'else', url=server.url)
  assert _published_sha256(published) in message


@pytest.mark.parametrize('spell', [str.lower, str.upper])
def test_checksum_can_be_replaced(
    dataset, data_dir, whole, records, spell):
  published = _publish(dataset, sha256=64 * '0')
  _get(published, data_dir, sha256=spell(_sha256(whole)))
  assert _extracted(dataset, records).items() <= _tree(data_dir).items()


def test_archive_can_be_taken_from_a_file(
    dataset, data_dir, server, records, tmp_path, whole):
  (tmp_path / 'elsewhere.tgz').write_bytes(whole)
  _get(dataset, data_dir, url=(tmp_path / 'elsewhere.tgz').as_uri())
  assert server.requests == []
  assert _tree(data_dir) == {ARCHIVE: whole, **_extracted(dataset, records)}
  assert (tmp_path / 'elsewhere.tgz').read_bytes() == whole


def test_archive_put_in_place_by_hand_is_used(
    dataset, data_dir, server, records, whole):
  (data_dir / ARCHIVE).write_bytes(whole)
  _get(dataset, data_dir)
  assert server.requests == []
  assert _tree(data_dir) == {ARCHIVE: whole, **_extracted(dataset, records)}


# Broken ones.


@pytest.mark.parametrize('share', [0, 0.5, 0.999])
def test_download_that_breaks_off_leaves_nothing_and_can_be_retried(
    dataset, data_dir, server, records, whole, share):
  server.sends = int(share * len(whole))
  assert server.url in _fail(dataset, data_dir)
  assert _tree(data_dir) == {}
  server.sends = None
  _get(dataset, data_dir)
  assert _tree(data_dir) == {ARCHIVE: whole, **_extracted(dataset, records)}


def test_remains_of_a_killed_download_are_replaced(
    dataset, data_dir, records, whole):
  (data_dir / (ARCHIVE + '.partial')).write_bytes(whole[:1000])
  _get(dataset, data_dir)
  assert _tree(data_dir) == {ARCHIVE: whole, **_extracted(dataset, records)}


def test_wrong_checksum_is_reported_and_leaves_nothing(
    dataset, data_dir, server, whole):
  server.content = whole[:-1] + b'?'
  message = _fail(dataset, data_dir)
  assert 'SHA-256' in message and _published_sha256(dataset) in message
  assert server.url in message
  assert _tree(data_dir) == {}


@pytest.mark.parametrize('status', [404, 500])
def test_server_that_has_no_archive_is_reported(
    dataset, data_dir, server, status):
  server.status = status
  message = _fail(dataset, data_dir)
  assert str(status) in message and server.url in message
  assert _tree(data_dir) == {}


def test_redirect_is_followed(dataset, data_dir, server, records, whole):
  server.location = '/elsewhere.tar.gz'
  _get(dataset, data_dir)
  assert server.requests == ['/' + ARCHIVE, '/elsewhere.tar.gz']
  assert _tree(data_dir) == {ARCHIVE: whole, **_extracted(dataset, records)}


@pytest.mark.parametrize('sends', [0, 1000])
def test_server_that_falls_silent_is_given_up(
    dataset, data_dir, server, monkeypatch, sends):
  monkeypatch.setattr(cifar10_input, '_DOWNLOAD_TIMEOUT_SECS', 0.5)
  server.sends, server.patience = sends, threading.Event()
  try:
    message = _fail(dataset, data_dir)
  finally:
    server.patience.set()
  assert 'timed out' in message and server.url in message
  assert _tree(data_dir) == {}


def test_page_in_the_place_of_the_archive_is_not_taken_for_it(
    dataset, data_dir, server):
  server.content = b'<html>Please log in.</html>' * 1000
  message = _fail(dataset, data_dir)
  assert 'SHA-256' in message and server.url in message
  assert _tree(data_dir) == {}


def test_signal_ends_a_download_and_leaves_nothing(
    dataset, data_dir, server, monkeypatch, call_script):
  server.sends, server.patience = 1000, threading.Event()
  monkeypatch.setitem(cifar10_input.DATASETS, 'cifar10', dataset)
  timer = threading.Timer(
      1, lambda: (os.kill(os.getpid(), signal.SIGTERM), server.patience.set()))
  timer.start()
  run = call_script(
      cifar10_train.main, '--dataset=cifar10', '--data_dir=%s' % data_dir,
      '--train_dir=%s' % (data_dir.parent / 'train'))
  assert run.code == 143
  assert run.stderr == 'script.py: stopped by SIGTERM.\n'
  assert _tree(data_dir) == {}


@pytest.mark.parametrize('url', [
    'http://127.0.0.1:1/\u00e4.tar.gz', 'http://[/tiny.tar.gz'])
def test_url_that_is_none_is_named(dataset, data_dir, url):
  assert url in _fail(dataset, data_dir, url=url)
  assert _tree(data_dir) == {}


def _closed_port():
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def test_unreachable_host_is_one_line_that_says_what_to_do(
    dataset, data_dir, monkeypatch, call_script):
  url = 'http://127.0.0.1:%d/%s' % (_closed_port(), ARCHIVE)
  monkeypatch.setitem(
      cifar10_input.DATASETS, 'cifar10', _publish(dataset, url=url))
  run = call_script(
      cifar10_train.main, '--dataset=cifar10', '--data_dir=%s' % data_dir,
      '--train_dir=%s' % (data_dir.parent / 'train'))
  assert run.code == 1
  assert run.stderr.count('\n') == 1
  for part in (url, '--data_url', '--dataset=synthetic',
               str(data_dir / ARCHIVE)):
    assert part in run.stderr
  assert _tree(data_dir) == {}


def test_wrong_archive_in_place_is_reported_and_kept(
    dataset, data_dir, server):
  (data_dir / ARCHIVE).write_bytes(b'mine')
  message = _fail(dataset, data_dir)
  for part in (str(data_dir / ARCHIVE), _sha256(b'mine'),
               _published_sha256(dataset), '--data_sha256'):
    assert part in message
  assert server.requests == []
  assert _tree(data_dir) == {ARCHIVE: b'mine'}


def test_download_leaves_the_timeout_of_sockets_alone(
    dataset, data_dir, server):
  before = socket.getdefaulttimeout()
  socket.setdefaulttimeout(17)
  try:
    _get(dataset, data_dir)
    server.sends = 0
    _fail(dataset, data_dir.parent / 'else')
    assert socket.getdefaulttimeout() == 17
  finally:
    socket.setdefaulttimeout(before)


def test_of_two_first_starts_one_gets_the_data_and_the_other_waits(
    start_script, finish, tmp_path):
  flags = ['--dataset=synthetic', '--data_dir=%s' % tmp_path]
  trainer = start_script(
      'cifar10_train', *flags, '--train_dir=%s' % (tmp_path / 'train'),
      '--max_steps=1', '--batch_size=8')
  evaluation = start_script(
      'cifar10_eval', *flags, '--checkpoint_dir=%s' % (tmp_path / 'none'),
      '--eval_dir=%s' % (tmp_path / 'eval'), '--run_once')
  trainer, evaluation = finish(trainer), finish(evaluation)
  assert (trainer.code, trainer.stderr) == (0, '')
  assert 'no whole checkpoint' in evaluation.stderr
  generated = trainer.stdout + evaluation.stdout
  assert generated.count('Generating the synthetic data set.') == 1


# Archives that are not what they should be, with a checksum that says so too.


def _serve(server, dataset, content):
  server.content = content
  return _publish(dataset, sha256=_sha256(content))


def _spoil_middle(content):
  middle = len(content) // 2
  return content[:middle] + bytes(200) + content[middle + 200:]


@pytest.mark.parametrize('spoil', [
    pytest.param(lambda whole: whole[:len(whole) // 2], id='half'),
    pytest.param(lambda whole: whole[:20], id='head'),
    pytest.param(_spoil_middle, id='hole'),
    pytest.param(lambda whole: b'', id='empty'),
    pytest.param(lambda whole: b'<html>Please log in.</html>' * 1000,
                 id='page'),
    pytest.param(lambda whole: gzip.compress(b'no archive' * 1000),
                 id='other contents')])
def test_archive_that_cannot_be_extracted_is_reported(
    dataset, data_dir, server, whole, spoil):
  spoilt = spoil(whole)
  message = _fail(_serve(server, dataset, spoilt), data_dir)
  assert str(data_dir / ARCHIVE) in message
  assert _tree(data_dir) == {ARCHIVE: spoilt}


@pytest.mark.parametrize('change', ['missing', 'shorter', 'longer', 'empty'])
def test_archive_without_a_file_of_the_right_size_is_reported(
    dataset, data_dir, server, records, change):
  contents = dict(records)
  contents['second.bin'] = {
      'shorter': contents['second.bin'][1:], 'empty': b'', 'missing': None,
      'longer': contents['second.bin'] + b'x'}[change]
  archive = _archive(*(
      _member('%s/%s' % (dataset.folder, name), content)
      for name, content in contents.items() if content is not None))
  message = _fail(_serve(server, dataset, archive), data_dir)
  assert 'second.bin' in message
  assert str(dataset.size_bytes('second.bin')) in message
  assert _tree(data_dir) == {ARCHIVE: archive}


def _hostile_members(dataset, outside):
  folder, size = dataset.folder, dataset.size_bytes('first.bin')
  link = {'type': tarfile.SYMTYPE, 'linkname': str(outside)}
  return {
      'above': [_member('../evil', b'x'), _member('../../evil', b'x'),
                _member(folder + '/../../evil', b'x')],
      'absolute': [_member(str(outside / 'evil'), b'x')],
      'link to a folder': [_member('way', **link), _member('way/evil', b'x')],
      'link in the place of the folder': [_member(folder, **link)],
      'link in the place of a file': [_member(
          folder + '/first.bin', type=tarfile.SYMTYPE,
          linkname=str(outside / 'evil'))],
      'hard link': [_member(folder + '/first.bin', type=tarfile.LNKTYPE,
                            linkname=str(outside / 'secret'))],
      'file beside its own': [_member(folder + '/evil', b'x'),
                              _member('evil', b'x')],
      'link as large as a file': [_member(
          folder + '/first.bin', type=tarfile.SYMTYPE, size=size,
          linkname=str(outside / 'secret'))],
      'device': [_member(folder + '/first.bin', type=tarfile.FIFOTYPE)],
  }


@pytest.mark.parametrize('kind', [
    'above', 'absolute', 'link to a folder', 'link in the place of the folder',
    'link in the place of a file', 'hard link', 'file beside its own',
    'link as large as a file', 'device'])
def test_hostile_members_write_nothing_but_the_files(
    dataset, data_dir, server, records, tmp_path, kind):
  outside = tmp_path / 'outside'
  outside.mkdir()
  (outside / 'secret').write_text('secret')
  archive = _archive(
      *_hostile_members(dataset, outside)[kind],
      *(_member('%s/%s' % (dataset.folder, name), content)
        for name, content in records.items()))
  _get(_serve(server, dataset, archive), data_dir)
  assert _tree(tmp_path) == {
      'outside/secret': b'secret', 'outer/data/' + ARCHIVE: archive,
      **{'outer/data/' + name: content
         for name, content in _extracted(dataset, records).items()}}


def test_bomb_is_not_unpacked_to_the_end(
    dataset, data_dir, server, members):
  bomb = _archive(_member('bomb', bytes(100 << 20)), *members)
  assert len(bomb) < 1 << 20
  message = _fail(_serve(server, dataset, bomb), data_dir)
  assert 'unpacks to more than' in message
  assert _tree(data_dir) == {ARCHIVE: bomb}


@pytest.mark.parametrize('member', ['link', 'folder'])
def test_what_is_no_file_is_not_taken_for_one(
    dataset, data_dir, server, records, tmp_path, member):
  (tmp_path / 'first.bin').write_bytes(records['first.bin'])
  name = dataset.folder + '/first.bin'
  archive = _archive(
      _member(name, type=tarfile.SYMTYPE, linkname=str(tmp_path / 'first.bin'))
      if member == 'link' else _member(name, type=tarfile.DIRTYPE),
      *(_member('%s/%s' % (dataset.folder, name), content)
        for name, content in records.items() if name != 'first.bin'))
  message = _fail(_serve(server, dataset, archive), data_dir)
  assert 'first.bin' in message
  assert _tree(data_dir) == {ARCHIVE: archive}


def test_file_of_the_user_stays_when_another_is_missing(
    dataset, data_dir, server, records):
  _get(dataset, data_dir)
  folder = data_dir / dataset.folder
  own = bytes(len(records['first.bin']))
  (folder / 'first.bin').write_bytes(own)
  (folder / 'second.bin').unlink()
  _get(dataset, data_dir)
  assert (folder / 'first.bin').read_bytes() == own
  assert (folder / 'second.bin').read_bytes() == records['second.bin']

"""Words to numbers: as ByT5 and Hugging Face's tokenizers have them."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from sequences import TEXTS, write_texts
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from big_vit.data import dataset, order, transforms
from big_vit.data.transforms import operations, text
from big_vit.errors import UserError

LINES = ['the cat sat on the mat', 'a dog sat on a log', 'the dog ate the cat', '', 'Grüße']


def apply(line, texts):
    keys = order.example_keys(0, 0, np.arange(len(texts)))
    return transforms.parse(line, size=(16, 16))({'text': texts}, keys)


def test_bytes_are_tokens():
    found = apply('lower | byte_tokens(6)', ['AB', 'grün', '', 'Abcdefgh'])
    wanted = [
        [ord('a') + 3, ord('b') + 3, 1, 0, 0, 0],
        [*(byte + 3 for byte in 'grün'.encode()), 1],
        [1, 0, 0, 0, 0, 0],
        [*(byte + 3 for byte in b'abcde'), 1],
    ]
    assert found['tokens'].tolist() == wanted
    assert found['tokens'].dtype == np.int32
    assert found['text_mask'].sum(1).tolist() == [3, 6, 1, 6]
    assert set(found) == {'tokens', 'text_mask'}


def test_bytes_are_those_of_byt5():
    # Ids that the tokenizer of google/byt5-small gives to this sentence, from its documentation.
    found = apply('byte_tokens(24)', ['Life is like a box.'])['tokens'][0].tolist()
    assert found[:9] == [79, 108, 105, 104, 35, 108, 118, 35, 111]
    assert found[18:] == [49, 1, 0, 0, 0, 0]


def made(kind):
    """A tokenizer trained on a few words; its file, at will with special tokens about a text."""
    special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]']
    if kind == 'BPE':
        tokenizer = Tokenizer(models.BPE(unk_token='[UNK]'))
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token='[UNK]'))
        trainer = trainers.WordPieceTrainer(
            vocab_size=60, special_tokens=special, show_progress=False
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(LINES[:3], trainer)
    if kind == 'WordPiece':
        tokenizer.post_processor = processors.TemplateProcessing(
            single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
        )
    return tokenizer


@pytest.mark.parametrize('kind', ['BPE', 'WordPiece'])
@pytest.mark.parametrize('length', [3, 5, 20])
def test_tokens_are_those_of_the_library(tmp_path, kind, length):
    tokenizer = made(kind)
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    found = apply(f'tokenize({str(tmp_path / "tokenizer.json")!r}, {length})', LINES)
    for row, mask, line in zip(found['tokens'], found['text_mask'], LINES, strict=True):
        ids = tokenizer.encode(line).ids
        if len(ids) > length:
            ids = [*ids[: length - 1], 3] if kind == 'WordPiece' else ids[:length]
        assert row.tolist() == ids + [0] * (length - len(ids))
        assert mask.tolist() == [1] * len(ids) + [0] * (length - len(ids))
    assert found['tokens'].dtype == np.int32


def test_padding_is_that_of_the_file(tmp_path):
    for name, configure, wanted in (
        ('said', lambda t: t.enable_padding(pad_id=7), 7),
        ('named', lambda t: None, 0),
        ('other', lambda t: t.add_special_tokens(['<pad>']), None),
    ):
        tokenizer = made('BPE')
        if name == 'other':
            tokenizer = Tokenizer(models.BPE({'a': 0, 'b': 1}, []))
        configure(tokenizer)
        wanted = tokenizer.token_to_id('<pad>') if wanted is None else wanted
        tokenizer.save(str(tmp_path / f'{name}.json'))
        found = apply(f'tokenize({str(tmp_path / f"{name}.json")!r}, 9)', ['a'])
        assert found['tokens'][0, 1:].tolist() == [wanted] * 8


def test_one_tokenizer_for_all_threads(tmp_path):
    path = tmp_path / 'tokenizer.json'
    made('BPE').save(str(path))
    assert text._tokenizer(str(path), 0, 8)[0] is text._tokenizer(str(path), 0, 8)[0]
    operation, draw = text.tokenize(str(path), 8), lambda k: np.zeros(1)
    texts = [f'{line} {i}' for i in range(100) for line in LINES]
    wanted = operation.apply({'text': texts}, draw)['tokens']
    found = [None] * 6

    def work(k):
        for _ in range(5):
            found[k] = operation.apply({'text': texts}, draw)['tokens']

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tokens in found:
        np.testing.assert_array_equal(tokens, wanted)


@pytest.mark.skipif(not os.path.isdir('/proc/self/task'), reason='counts threads as Linux does')  # noqa: PTH112
def test_no_thread_is_started(tmp_path):
    made('BPE').save(str(tmp_path / 'tokenizer.json'))
    program = (
        'import os; from big_vit.data.transforms import text\n'
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        f'operation = text.tokenize({str(tmp_path / "tokenizer.json")!r}, 8); before = count()\n'
        "operation.apply({'text': ['the cat'] * 2000}, None); print(count() - before)\n"
    )
    environment = {**os.environ, 'TOKENIZERS_PARALLELISM': 'true'}
    done = subprocess.run(
        [sys.executable, '-c', program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ['0']


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / 'tokenizer.json'
    for count in (2, 3):
        Tokenizer(models.WordLevel({'a': count}, 'a')).save(str(path))
        os.utime(path, ns=(count, count))
        assert apply(f'tokenize({str(path)!r}, 1)', ['a'])['tokens'].tolist() == [[count]]


def test_wrong_files_and_arguments_are_refused_at_once(tmp_path):
    (tmp_path / 'no.json').write_text('{"a":\n 1}')
    made('WordPiece').save(str(tmp_path / 'two.json'))
    for line, message in (
        ("tokenize('/no/such.json', 5)", r"tokenize cannot read '/no/such\.json' \(No such file"),
        (f'tokenize({str(tmp_path)!r}, 5)', 'tokenize cannot read .*a folder'),
        (f'tokenize({str(tmp_path / "no.json")!r}, 5)', r"tokenize cannot use '.*no\.json'"),
        (f'tokenize({str(tmp_path / "two.json")!r}, 1)', 'tokenize takes a length of at least 2'),
        ('tokenize(3, 5)', 'takes the path of a tokenizer file, not 3'),
        ('byte_tokens(0)', 'for length'),
    ):
        with pytest.raises(UserError, match=message) as error:
            transforms.parse(line, size=(8, 8))
        assert '\n' not in str(error.value)


def test_a_missing_library_is_said_at_once(tmp_path, monkeypatch):
    made('BPE').save(str(tmp_path / 'tokenizer.json'))
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(UserError, match='tokenize needs `pip install tokenizers`'):
        transforms.parse(f'tokenize({str(tmp_path / "tokenizer.json")!r}, 7)', size=(8, 8))


@pytest.mark.parametrize('bad', ['half \ud83d of a character', None])
def test_what_is_no_text_is_said_and_where(tmp_path, bad):
    path = tmp_path / 'tokenizer.json'
    made('BPE').save(str(path))
    for line in (f'tokenize({str(path)!r}, 5)', 'byte_tokens(5)', 'lower'):
        with pytest.raises(operations.BadExampleError, match='not a text') as error:
            apply(line, ['fine', bad])
        assert error.value.row == 1
    with pytest.raises(UserError, match="needs 'text', but these examples have label"):
        transforms.parse('lower', size=(8, 8))({'label': np.zeros(1)}, np.zeros(1, np.uint64))


def test_a_folder_of_texts(tmp_path):
    write_texts(tmp_path, count=3)
    spec = dataset.Spec(
        'data', 'folder', 'train', 'byte_tokens(40)', (8, 8), settings=(('path', str(tmp_path)),)
    )
    source, rest = dataset.open_examples((spec,))
    index = np.arange(6)
    columns = source.load(index)
    columns = rest(columns, order.example_keys(0, 0, index))
    for row, (tokens, mask) in enumerate(zip(columns['tokens'], columns['text_mask'], strict=True)):
        read = bytes((tokens[: mask.sum() - 1] - 3).astype(np.uint8)).decode()
        assert read == f'{TEXTS[sorted(TEXTS)[columns["label"][row]]]} {row % 3}\n'

"""Corpora: which files are texts, which are held out, and what comes back of a pack."""

import gzip
import hashlib
import io
import json
import lzma
import sys
import tarfile

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.data import corpus, files

TEXTS = {f"d{i % 7}/{i}.c": b"int main_%d = %d;\n" % (i, i) * 3 for i in range(400)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of texts."""
    folder = tmp_path_factory.mktemp("texts")
    for name, content in TEXTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """Its corpus, of bytes."""
    out = tmp_path_factory.mktemp("corpus")
    main(["corpus", "--text", str(folder), "--out", str(out), "--vocabulary", "256"])
    return out / folder.name


def tar(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def test_texts_are_found_in_archives_within_archives(tmp_path):
    """As Debian's packages have them: a tar.xz in a tar, or gzipped files."""
    inner = {"a/b.c": b"b", "a/image": b"\0\1", "a/latin": "é".encode("latin-1")}
    inner |= {"a/table.h": b"x" * (files.LONGEST + 1), "a/page.html": b"b", "a/no": b""}
    path = tmp_path / "texts.tar"
    members = {"usr/src.tar.xz": lzma.compress(tar(inner)), "c.gz": gzip.compress(b"c")}
    path.write_bytes(tar(members))
    assert dict(files.text_files(str(path))) == {"a/b.c": b"b", "c": b"c"}


def test_a_file_is_held_out_by_the_hash_of_its_path(made):
    data = corpus.read_corpus(made, 256)
    digests = {p: hashlib.sha256(p.encode()).hexdigest() for p in TEXTS}
    order = sorted(TEXTS, key=lambda path: digests[path])
    held_out = [p for p in order if int(digests[p][-8:], 16) / 2**32 < 0.01]
    assert 0 < len(held_out) < 20
    rest = [p for p in order if p not in held_out]
    for tokens, paths in ((data.train, rest), (data.held_out, held_out)):
        assert tokens.dtype == np.uint16
        assert bytes(tokens.tolist()) == b"".join(TEXTS[p] + b"\0" for p in paths)
    assert data.facts["held-out bytes"] == sum(len(TEXTS[p]) for p in held_out)


def test_byte_pairs_are_read_back(folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    command = ["corpus", "--text", str(folder), "--out", str(tmp_path)]
    main([*command, "--vocabulary", "270"])
    place = tmp_path / folder.name / "270"
    tokenizer = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json"))
    data = corpus.read_corpus(place.parent, 270)
    assert 256 < data.held_out.max() < 270
    first = data.held_out[: np.argmax(data.held_out == corpus.END)]
    assert tokenizer.decode(first.tolist()).encode() in TEXTS.values()
    with pytest.raises(ValueError, match="of 256, for bytes, to 65536 tokens, got 9"):
        main([*command, "--vocabulary", "9"])


@pytest.mark.parametrize("text", ["texts-6.1", "texts-6.1=6.1.192-3"])
def test_a_package_of_any_version_has_one_folder(text, tmp_path, monkeypatch):
    """So that what trained on one version is told from others by its hash alone."""
    asked = []
    monkeypatch.setattr(
        files, "_package", lambda name: asked.append(name) or TEXTS.items()
    )
    corpus.corpus(text, tmp_path, vocabulary=(256,))
    assert asked == [text]
    assert corpus.read_corpus(tmp_path / "texts-6.1", 256).facts["name"] == "texts-6.1"


def test_a_pack_holds_the_first_part(made, tmp_path):
    path = tmp_path / "pack.tar"
    command = ["pack", "--folder", str(made), "--out", str(path), "--vocabulary", "256"]
    main([*command, "--mebibytes", "1"])
    assert path.stat().st_size < 2**20
    main(["corpus", "--text", str(path), "--out", str(tmp_path)])
    data, whole = (corpus.read_corpus(f, 256) for f in (tmp_path / made.name, made))
    np.testing.assert_array_equal(data.held_out, whole.held_out)
    np.testing.assert_array_equal(data.train, whole.train)
    assert data.facts == whole.facts
    with pytest.raises(ValueError, match=r"0\.1, which leaves no room.*one more"):
        main([*command, "--mebibytes", "0.1"])

    # What cannot be made smaller shows how much is taken.
    tokens = np.random.default_rng(0).integers(0, 2**16, 400_000).astype("<u2")
    packed, count = corpus._compressed(tokens, 600_000)
    assert 300_000 < len(packed) < 600_000
    np.testing.assert_array_equal(
        np.frombuffer(lzma.decompress(packed), "<u2"), tokens[:count]
    )


def test_damage_is_found(made, tmp_path):
    data = corpus.read_corpus(made, 256)
    facts = data.facts | {"train": 2, "held-out": 1}
    xz = lambda *tokens: lzma.compress(np.array(tokens, "<u2").tobytes())
    members = {"train.xz": xz(1, 2), "held-out.xz": xz(3)}
    members["corpus.json"] = json.dumps(facts).encode()
    (tmp_path / "pack.tar").write_bytes(tar(members))
    with pytest.raises(ValueError, match=r"pack\.tar is damaged.*pack it again"):
        corpus.corpus(str(tmp_path / "pack.tar"), tmp_path)
    place = tmp_path / "name" / "256"
    place.mkdir(parents=True)
    (place / "corpus.json").write_text(json.dumps(facts))
    (place / "train.u16").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"train\.u16 should have 2 tokens.*damaged"):
        corpus.read_corpus(place.parent, 256)


def test_what_is_missing_is_named_with_its_remedy(folder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"benchmarks corpus --text linux-doc"):
        corpus.read_corpus(tmp_path / "linux-doc-6.1", 1024)
    monkeypatch.setattr(files.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"no package.*no apt-get.*or a pack"):
        corpus.corpus("no-such-package", tmp_path, vocabulary=(256,))
    with pytest.raises(ValueError, match=r"0 files of text, too few.*hundreds"):
        corpus.corpus(str(tmp_path), tmp_path, vocabulary=(256,))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"\.\[corpus\]'.*--vocabulary 256"):
        corpus.corpus(str(folder), tmp_path)


def test_every_eighth_topic_of_the_language_reference_is_held_out(monkeypatch):
    texts = {"a": "one", "b": "two", **{f"c{i}": "x" for i in range(7)}}
    monkeypatch.setattr(corpus, "topics", texts)
    encode = lambda text: list(text.encode())
    monkeypatch.setattr(corpus, "smollm_tokenizer", lambda: encode)
    found = corpus.language_reference()
    assert bytes(found.held_out.astype(np.uint8)) == b"one\0x\0"
    assert bytes(found.train.astype(np.uint8)) == b"two\0" + 6 * b"x\0"
    assert found.facts["train"] == 16 and found.facts["held-out"] == 6
